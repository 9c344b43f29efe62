/* Gradients of what forward.c computes; see call.h.
 *
 *     ds_j = p_j (grad . v_j - grad . out) scale
 *     dq = sum_j ds_j k_j,   dk_j = sum_rows ds_j q,   dv_j = sum_rows p_j grad
 *
 * A key head is one piece of work: gradients of its keys are summed by one thread, query by query.
 */
#include "ends.h"

#define COLUMNS 2 /* vectors of channels at once in a sum over queries */

typedef struct {
    lanes *x, *grad, *dq;    /* [channels] */
    lanes *weights, *scores; /* [BLOCK] */
    float *q_rows, *grad_rows; /* [LANES][width]: turned and scaled; as it came */
    float *row, *rows;         /* [width], [BLOCK][D] */
    float *of_k, *of_v;        /* [keys][width]: gradients of the ends, turned */
    Ends ends;
} Space;

typedef struct {
    const Backward *task;
    Space *spaces;
    int64_t heads_done;
    Team team;
} Plan;

static inline int64_t width_of(const Call *call) { return up_to(call->channels, W); }

static void space_lay_out(Space *space, const Call *call, char **at) {
    const int64_t padded = up_to(call->channels, R), width = width_of(call);
    const int64_t keys = blocks_of(call->past + finished(call)) * BLOCK;
    lanes **of_channels[] = {&space->x, &space->grad, &space->dq};
    for (int i = 0; i < 3; i++)
        *of_channels[i] = take_bytes(at, padded * (int64_t)sizeof(lanes));
    space->weights = take_bytes(at, BLOCK * (int64_t)sizeof(lanes));
    space->scores = take_bytes(at, BLOCK * (int64_t)sizeof(lanes));
    space->q_rows = take_bytes(at, LANES * width * (int64_t)sizeof(float));
    space->grad_rows = take_bytes(at, LANES * width * (int64_t)sizeof(float));
    space->row = take_bytes(at, width * (int64_t)sizeof(float));
    space->rows = take_bytes(at, BLOCK * call->channels * (int64_t)sizeof(float));
    space->of_k = take_bytes(at, keys * width * (int64_t)sizeof(float));
    space->of_v = take_bytes(at, keys * width * (int64_t)sizeof(float));
    ends_lay_out(&space->ends, call, at);
}

REGARD_INLINE void spread_columns(
    int64_t rows, const float *a, const float *b, float *to, int64_t width, int64_t count,
    const int columns
) {
    for (int64_t key = 0; key < count; key += R, to += R * width) {
        vector acc[R][COLUMNS];
        FOR_ROWS(r) REGARD_UNROLL for (int v = 0; v < columns; v++)
            acc[r][v] = v_load(to + r * width + v * W);
        const float *factor = a + key * LANES, *row = b;
        for (int64_t lane = 0; lane < rows; lane++, factor++, row += width) {
            FOR_ROWS(r) REGARD_UNROLL for (int v = 0; v < columns; v++)
                acc[r][v] += factor[r * LANES] * v_load(row + v * W);
        }
        FOR_ROWS(r) REGARD_UNROLL for (int v = 0; v < columns; v++)
            v_store(to + r * width + v * W, acc[r][v]);
    }
}

/* to[key, c] += sum_row a[key][row] b[row][c] for `count` keys, a multiple of R. */
static void spread(
    int64_t rows, const lanes *a, const float *b, float *to, int64_t width, int64_t count
) {
    const float *factors = (const float *)a;
    for (int64_t c = 0; c < width; c += COLUMNS * W) {
        if (width - c >= COLUMNS * W)
            spread_columns(rows, factors, b + c, to + c, width, count, COLUMNS);
        else spread_columns(rows, factors, b + c, to + c, width, count, 1);
    }
}

REGARD_INLINE void block_gradients(
    Space *space, int64_t rows, int64_t width, Panel panel, int64_t block, int64_t most,
    const lanes sees, const lanes lse, const lanes delta, const int cut
) {
    const int64_t first = block * BLOCK, left = up_to(most - first, R);
    const int64_t count = left < BLOCK ? left : BLOCK;
    const float *k = space->ends.k + block * panel.floats;
    const float *v = space->ends.v + block * panel.floats;
    float *of_k = space->of_k + first * width, *of_v = space->of_v + first * width;
    const vector zero = {0};
    for (int64_t key = 0; key < count; key += R) {
        vector s[R][REGARD_VECTORS], products[R][REGARD_VECTORS];
        scores_of(k, panel, key, first, (const lanes *)space->x, sees, cut, s);
        FOR_ROWS(r) FOR_VECTORS(i) {
            const vector least = s[r][i] - lse[i];
            space->weights[key + r][i] = v_exp2(v_select((vector_mask)(least > zero), zero, least));
        }
        FOR_ROWS(r) FOR_VECTORS(i) products[r][i] = zero;
        panel_dot(v, panel, key, (const lanes *)space->grad, products);
        FOR_ROWS(r) FOR_VECTORS(i) {
            const vector weight = space->weights[key + r][i];
            const vector of_score = weight * (products[r][i] - delta[i]);
            space->scores[key + r][i] =
                cut ? v_keep((vector_mask)(weight != zero), of_score) : of_score;
        }
    }
    panel_collect(REGARD_VECTORS, k, panel, count, (const lanes *)space->scores, space->dq);
    spread(rows, (const lanes *)space->scores, space->q_rows, of_k, width, count);
    spread(rows, (const lanes *)space->weights, space->grad_rows, of_v, width, count);
}

static void tile_gradients(
    Space *space, const Backward *task, int64_t b, int64_t h, int64_t start
) {
    const Call *call = &task->call;
    const int64_t D = call->channels, hk = h / (call->heads / call->key_heads);
    const int64_t width = width_of(call);
    const int64_t rows = call->queries - start < LANES ? call->queries - start : LANES;
    const Panel panel = panel_of(BLOCK, D);
    const float scale = (float)call->scale, unit = (float)(call->scale * REGARD_LOG2E);
    const int64_t head = (b * call->heads + h) * call->queries + start;
    lanes sees, lse, delta;
    float *last = (float *)sees;
    const size_t of_channels = (size_t)(panel.groups * R) * sizeof(lanes);
    memset(space->x, 0, of_channels), memset(space->grad, 0, of_channels);
    memset(space->dq, 0, of_channels);
    memset(space->q_rows, 0, (size_t)(LANES * width) * sizeof(float));
    memset(space->grad_rows, 0, (size_t)(LANES * width) * sizeof(float));
    FOR_VECTORS(v) sees[v] = delta[v] = (vector){0}, lse[v] = v_broadcast(INFINITY);
    int64_t most = 0, least = INT64_MAX;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t place = place_of(call, b, start + i);
        if (place >= 0) {
            const float *q = row_of(call->q, b, h, start + i);
            const float *grad = row_of(task->grad, b, h, start + i);
            float *turned = space->q_rows + i * width;
            last[i] = (float)(space->ends.old + place / call->chunk);
            ((float *)lse)[i] = call->lse[head + i];
            ((float *)delta)[i] = dot(grad, call->out + (head + i) * D, D);
            turn(call, b, place / call->chunk, 1, q, turned);
            memcpy(space->grad_rows + i * width, grad, (size_t)D * sizeof(float));
            for (int64_t c = 0; c < D; c++) {
                ((float *)space->x)[c * LANES + i] = unit * turned[c];
                ((float *)space->grad)[c * LANES + i] = grad[c];
                turned[c] *= scale;
            }
        }
        const int64_t mine = (int64_t)last[i];
        most = mine > most ? mine : most;
        least = mine < least ? mine : least;
    }
    if (rows < LANES) least = 0;
    for (int64_t block = 0; block * BLOCK < most; block++) {
        const int64_t end = block * BLOCK + BLOCK < most ? block * BLOCK + BLOCK : most;
        if (up_to(end, R) <= least)
            block_gradients(space, rows, width, panel, block, most, sees, lse, delta, 0);
        else block_gradients(space, rows, width, panel, block, most, sees, lse, delta, 1);
    }
    for (int64_t i = 0; i < rows; i++) {
        const int64_t place = place_of(call, b, start + i);
        float *dq = task->dq + (head + i) * D;
        if (place < 0) {
            memset(dq, 0, (size_t)D * sizeof(float));
            continue;
        }
        const float *q = row_of(call->q, b, h, start + i);
        const float *grad = row_of(task->grad, b, h, start + i);
        const float *k = row_of(call->k, b, hk, place), *v = row_of(call->v, b, hk, place);
        const int64_t at = ((b * call->key_heads + hk) * call->places + place) * D;
        float *restrict dk = task->dk + at, *restrict dv = task->dv + at;
        const float above = unit * dot(q, k, D) - ((float *)lse)[i];
        const float p = exp2f(above > 0 ? 0 : above);
        const float of_score = p * (dot(grad, v, D) - ((float *)delta)[i]) * scale;
        for (int64_t c = 0; c < D; c++) space->row[c] = scale * ((float *)space->dq)[c * LANES + i];
        turn(call, b, place / call->chunk, -1, space->row, dq);
        for (int64_t c = 0; c < D; c++) {
            dq[c] += of_score * k[c];
            dk[c] += of_score * q[c];
            dv[c] += p * grad[c];
        }
    }
}

static void head_gradients(Space *space, const Backward *task, int64_t b, int64_t hk) {
    const Call *call = &task->call;
    const int64_t D = call->channels, width = width_of(call), slot = b * call->key_heads + hk;
    const int64_t group = call->heads / call->key_heads, L = call->chunk;
    Ends *ends = &space->ends;
    ends_pack(ends, call, b, hk, space->rows);
    const size_t bytes = (size_t)(blocks_of(ends->count) * BLOCK * width) * sizeof(float);
    memset(space->of_k, 0, bytes), memset(space->of_v, 0, bytes);
    for (int64_t h = hk * group; h < (hk + 1) * group; h++)
        for (int64_t start = 0; start < call->queries; start += LANES)
            tile_gradients(space, task, b, h, start);
    for (int64_t j = 0; j < ends->count; j++) {
        const int64_t chunk = j - ends->old, last = slot * call->places + chunk * L + L - 1;
        const int64_t at = chunk < 0 ? slot * call->past + j : last;
        float *dk = (chunk < 0 ? task->d_past_k : task->dk) + at * D;
        float *dv = (chunk < 0 ? task->d_past_v : task->dv) + at * D;
        const float *of_k = space->of_k + j * width, *of_v = space->of_v + j * width;
        if (chunk < 0) memcpy(space->row, of_k, (size_t)D * sizeof(float));
        else turn(call, b, chunk, -1, of_k, space->row);
        for (int64_t c = 0; c < D; c++) dk[c] += space->row[c], dv[c] += of_v[c];
    }
}

static void work(void *shared, int64_t thread) {
    Plan *plan = shared;
    const Call *call = &plan->task->call;
    for (int64_t n; (n = take_next(&plan->heads_done)) < call->batch * call->key_heads;)
        head_gradients(plan->spaces + thread, plan->task, n / call->key_heads, n % call->key_heads);
}

/* Computes a call; REGARD_NO_MEMORY if it could not. */
REGARD_EXPORT(int64_t, rat_backward)
(const Backward *task) {
    const Call *call = &task->call;
    const int64_t heads = call->batch * call->key_heads;
    int64_t threads = call->threads > 1 ? call->threads : 1;
    if (threads > heads) threads = heads;
    if (!heads || !call->queries) return 0;
    Space one;
    char *end = 0;
    space_lay_out(&one, call, &end);
    const int64_t of_list = aligned_bytes(threads * (int64_t)sizeof(Space));
    char *space = aligned_block(of_list + threads * (int64_t)(intptr_t)end);
    if (!space) return REGARD_NO_MEMORY;
    char *at = space;
    Plan plan = {.task = task};
    plan.spaces = take_bytes(&at, of_list);
    for (int64_t i = 0; i < threads; i++) space_lay_out(plan.spaces + i, call, &at);
    run_team(&plan.team, threads, work, &plan);
    free_block(space);
    return 0;
}

REGARD_EXPORT(int64_t, rat_backward_size)
(void) { return sizeof(Backward); }
