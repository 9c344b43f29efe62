/* Decoding: a few query rows against a long cache of row-major keys.
 *
 * With a handful of rows the lanes of a tile would be empty: here vectors lie along the channels.
 * Threads share the key heads, or the chunks of one key head after the other where there are
 * fewer heads than threads and the cache is long.
 */
#include "row_solve.h"

/* The first key that any row could see by position: a centre that no later key can change. */
static int64_t first_key(const Head *h) {
    const Call *call = h->call;
    int64_t j = call->left < 0 ? 0 : call->keys - call->queries - call->left;
    if (j < 0) j = 0;
    if (h->mask)
        while (j < call->keys && !h->mask[j * h->mask_step]) j++;
    return j < call->keys ? j : -1;
}

/* A row of query head `head`: what it sees, and what its keys are multiplied with at first. */
static void set_row(const Head *h, Row *row, int64_t head, int64_t t) {
    const Call *call = h->call;
    const int64_t position = t + call->keys - call->queries, right = call->causal ? 0 : call->right;
    int64_t low = call->left < 0 ? 0 : position - call->left;
    int64_t high = right < 0 ? call->keys : position + right + 1;
    if (low < 0) low = 0;
    if (high > call->keys) high = call->keys;
    row->bias = NULL, row->decay = NULL;
    if (call->key_bias.data) {
        const int64_t of = operand_head(call, call->bias_heads, head);
        row->bias = (const float *)call->key_bias.data + h->b * call->key_bias.batch +
                    of * call->key_bias.head;
    }
    if (call->decay_sums.data && call->keys) {
        const int64_t of = operand_head(call, call->decay_heads, head);
        int64_t at = call->causal ? position : call->keys - 1;
        if (at < 0) at = 0;
        const int64_t first = first_at(call->decay_first, h->b, of, at);
        if (low < first) low = first;
        row->decay = (const double *)call->decay_sums.data + h->b * call->decay_sums.batch +
                     of * call->decay_sums.head;
        row->decayed = row->decay[at * call->decay_sums.row];
    }
    row->low = low, row->high = high > low ? high : low;
    row->head = head;
    row->at = (h->b * call->heads + head) * call->queries + t;
    row->active = row->high > row->low;
    const float scale = operand_at(call->scale, h->b, head, 0, 0) * LOG2E;
    for (int64_t c = 0; c < h->padded; c++) {
        const int some = c < call->channels;
        row->q[c] = some ? operand_at(call->q, h->b, head, t, c) * scale : 0;
        if (row->product) row->x[c] = some ? operand_at(call->probe, h->b, head, t, c) : 0;
    }
    if (call->mode == SOLVED) row->ridge = operand_at(call->ridge, h->b, head, t, 0);
}

/* The right-hand side kbar - q, and everything else of the system, after SCORES. */
static void set_system(const Head *h, Row *row, int64_t r) {
    const Call *call = h->call;
    merge(h, r, row->mean, 1, h->padded);
    if (call->absolute && row->some) row->ridge *= expf(-row->lse);
    memset(row->right, 0, h->padded * sizeof(float));
    for (int64_t c = 0; row->some && c < call->channels; c++) {
        const float q = operand_at(call->q, h->b, row->head, row->at % call->queries, c);
        row->right[c] = row->mean[c] - (q - (h->centre ? h->centre[c] : 0));
    }
}

/* What the signed weights of every row sum to beyond 1, the rounding of g . kbar, off their
 * constant. */
static void balance(Task *task, int64_t thread) {
    Head *h = &task->head;
    float constant[h->rows];
    for (int64_t r = 0; r < h->rows; r++) {
        constant[r] = h->row[r].constant;
        h->row[r].constant -= 1; /* the phase gives sums of p (g . kbar - g . k) */
    }
    do_phase(task, thread, COVARIANCE);
    for (int64_t r = 0; r < h->rows; r++) {
        const float excess = sum_of(h, r);
        h->row[r].constant = constant[r] - (fabsf(excess) < 0.5f ? excess : 0);
    }
}

static void do_head(Task *task, int64_t thread, int64_t number, float *centre) {
    Head *h = &task->head;
    const Call *call = h->call;
    const int64_t group = call->heads / call->key_heads, padded = h->padded;
    h->b = number / call->key_heads, h->head = number % call->key_heads;
    h->keys = operand_rows(call->k, h->b, h->head);
    h->values = operand_rows(call->v, h->b, h->head);
    h->mask = call->key_mask.data;
    h->mask_step = call->key_mask.row;
    if (h->mask) h->mask += h->b * call->key_mask.batch;
    h->centre = NULL;
    const int64_t first = first_key(h);
    if (call->intercept && first >= 0) {
        copy_rows(centre, 1, h->keys, first, 1, call->channels, padded, NULL, NULL, 0);
        h->centre = centre;
    }
    int64_t low = call->keys, high = 0;
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        set_row(h, row, h->head * group + r / call->queries, r % call->queries);
        if (row->active && row->low < low) low = row->low;
        if (row->active && row->high > high) high = row->high;
    }
    h->first_chunk = low < high ? low / CHUNK : 0;
    h->chunks = low < high ? (high + CHUNK - 1) / CHUNK - h->first_chunk : 0;
    do_phase(task, thread, SCORES);
    normalise(h);
    float residual[h->rows];
    int32_t steps[h->rows];
    uint8_t failed[h->rows];
    memset(residual, 0, sizeof residual), memset(steps, 0, sizeof steps);
    memset(failed, 0, sizeof failed);
    if (call->mode == SOLVED) {
        for (int64_t r = 0; r < h->rows; r++) set_system(h, h->row + r, r);
        (call->direct ? solve_directly : iterate)(task, thread, residual, steps, failed);
    }
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        row->active = row->some;
        if (call->mode == SOLVED) {
            const float length = sqrtf(dot(row->g, row->g, padded));
            const float size = sqrtf(dot(row->mean, row->mean, padded)) +
                               sqrtf(dot(row->right, row->right, padded));
            failed[r] |= !(FLT_EPSILON * length * size < 1e-3f); /* lost in rounding */
            memcpy(row->x, row->g, padded * sizeof(float));
            row->constant = dot(row->g, row->mean, padded) + (call->intercept ? 1 : 0);
            memcpy(call->slope + row->at * call->channels, row->g, call->channels * sizeof(float));
        } else {
            row->constant = row->at_mean;
        }
    }
    if (call->mode == SOLVED && call->precise && call->intercept) balance(task, thread);
    do_phase(task, thread, OUTPUT);
    for (int64_t r = 0; r < h->rows; r++) {
        Row *row = h->row + r;
        const float total = sum_of(h, r);
        float factor = 1;
        /* The signed weights sum to 1 but for rounding, which a large g would make visible. */
        if (call->intercept && fabsf(total - 1) < 0.5f) factor = 1 / total;
        float *out = call->out + row->at * call->value_channels;
        float *sum = row->values;
        merge(h, r, sum, factor, h->padded_v);
        memcpy(out, sum, call->value_channels * sizeof(float));
        call->lse[row->at] = row->lse;
        call->residual[row->at] = residual[r];
        call->iterations[row->at] = steps[r];
        call->failed[row->at] = failed[r];
    }
}

typedef struct {
    const Call *call;
    Task *task;       /* one per thread, or one for all */
    float *centre;    /* [tasks][padded, whole lines] */
    int64_t padded, next;
    int together;
    Team team;
} Whole;

static void work(void *shared, int64_t thread) {
    Whole *all = shared;
    const Call *call = all->call;
    Task *task = all->task + (all->together ? 0 : thread);
    if (all->together && thread) {
        follow(task, thread);
        return;
    }
    float *centre = all->centre + (task - all->task) * up_to(all->padded, 16);
    for (int64_t n; (n = take_next(&all->next)) < call->batch * call->key_heads;)
        do_head(task, thread, n, centre);
    if (all->together) do_phase(task, thread, STOP);
}

/* Cuts the memory of a task from `at`; with `at` at NULL it only measures. */
static void cut_task(Task *task, const Call *call, char **at, int measure) {
    Head h = {.call = call, .padded = up_to(call->channels, W)};
    h.padded_v = up_to(call->value_channels, W);
    h.rows = call->heads / call->key_heads * call->queries;
    const int64_t chunks = (call->keys + CHUNK - 1) / CHUNK, row_bytes = h.padded * sizeof(float);
    const int64_t widest = h.padded > h.padded_v ? h.padded : h.padded_v;
    Row *row = h.row = take_bytes(at, h.rows * sizeof(Row));
    Part *part = h.part = take_bytes(at, chunks * h.rows * sizeof(Part));
    for (int64_t r = 0; r < h.rows; r++) {
        Row one = {0};
        float **vectors[] = {
            &one.x, &one.q, &one.mean, &one.right, &one.g, &one.rest, &one.applied,
        };
        for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
            *vectors[i] = take_bytes(at, row_bytes);
        one.values = take_bytes(at, h.padded_v * sizeof(float));
        one.p = take_bytes(at, chunks * CHUNK * sizeof(float));
        if (call->mode == GIVEN) one.product = take_bytes(at, chunks * CHUNK * sizeof(float));
        if (!measure) row[r] = one;
    }
    for (int64_t i = 0; i < chunks * h.rows; i++) {
        Part one = {0};
        one.total = take_bytes(at, widest * sizeof(float));
        if (call->mode == SOLVED && call->direct)
            one.moments = take_bytes(at, h.padded * h.padded * sizeof(float));
        if (!measure) part[i] = one;
    }
    if (!measure) task->head = h;
}

/* The number of rows that failed, or REGARD_NO_MEMORY. Keys and values must be dense in their last
 * axis. */
REGARD_EXPORT(int64_t, local_linear_decode)
(const Call *call) {
    const int64_t heads = call->batch * call->key_heads;
    int64_t threads = call->threads < REGARD_MOST_THREADS ? call->threads : REGARD_MOST_THREADS;
    if (threads < 1) threads = 1;
    Whole all = {.call = call, .padded = up_to(call->channels, W)};
    all.together = threads > 1 && heads < threads && call->keys > CHUNK;
    if (!all.together && threads > heads) threads = heads > 1 ? heads : 1;
    const int64_t tasks = all.together ? 1 : threads;
    const int64_t scratch = aligned_bytes(
        scratch_floats(all.padded, up_to(call->value_channels, W)) * (int64_t)sizeof(float));
    char *at = NULL;
    Task unused;
    cut_task(&unused, call, &at, 1);
    const int64_t task_bytes = (int64_t)(intptr_t)at;
    const int64_t centre_bytes = up_to(all.padded, 16) * (int64_t)sizeof(float);
    const int64_t list_bytes = aligned_bytes(tasks * (int64_t)sizeof(Task));
    char *memory =
        aligned_block(list_bytes + tasks * (task_bytes + centre_bytes) + threads * scratch);
    if (!memory) return REGARD_NO_MEMORY;
    at = memory;
    all.task = take_bytes(&at, list_bytes);
    all.centre = take_bytes(&at, tasks * centre_bytes);
    char *spaces = take_bytes(&at, threads * scratch);
    for (int64_t i = 0; i < tasks; i++) {
        all.task[i] = (Task){.scratch = spaces, .scratch_bytes = scratch};
        all.task[i].team = all.together ? &all.team : NULL;
        cut_task(all.task + i, call, &at, 0);
    }
    run_team(&all.team, threads, work, &all);
    free_block(memory);
    int64_t failed = 0, rows = call->batch * call->heads * call->queries;
    for (int64_t i = 0; i < rows; i++) failed += call->failed[i];
    return failed;
}
