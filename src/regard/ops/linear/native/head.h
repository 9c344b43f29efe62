/* What all panels of a head share, made once: decays, chunks, products of rows, sums of weights. */
#ifndef LINEAR_HEAD_H
#define LINEAR_HEAD_H

#include "call.h"
#include "mapped.h"
#include "run.h"
#include "threads.h"

/* Work space of a head. Arrays per token have TOKENS entries to spare. */
typedef struct {
    float *factor, *channels; /* per token, or [token][stride] */
    double *owed;
    Chunk *chunks;
    Scores *keys, *values; /* products of q, k with k; of do, dv with v */
    float *beta, *negative_beta, *inverse, *slope;
    float *error, *pull;   /* [token][E], the delta rule's v - S^T k and the gradient of u */
    uint8_t *silent[2];    /* per token: do, du are all zero */
    float *sums;           /* [panel][token]: what each panel adds to the decay's gradient */
    vector *total;
    Settled *settled;      /* of the chunks of a block, or of all where threads work together */
    float left;            /* the last chunk's `after` */
    int64_t count; /* of chunks */
    Rows q, k;     /* as the walk reads them; `made` is where mapped ones lie: of two blocks in
                    * turn, as what is written waits for the next pass, or of all tokens */
    float *made[2][2], *map_work;
} Head;

/* One panel: what it is to do and how far it is. */
typedef struct {
    Run run;
    Walker walker;
} Panel;

/* Work space of a thread. */
typedef struct {
    Panel *panel, *back; /* of all panels of a head; `back` walks towards the first token */
    vector *nothing;
    float *zeros, *ones;
    vector *marks;    /* [panel][block]: states at the beginnings of blocks */
    vector *kept;     /* states before the chunks of one block */
    vector *entering; /* [chunk of the block][TOKENS][VECTORS] */
} Worker;

/* Those who work on a head: all members of a team, or one thread for itself. */
typedef struct {
    Team *team; /* NULL for one thread */
    int64_t member, members;
} Crew;

static void crew_wait(const Crew *crew) {
    if (crew->team) team_barrier(crew->team);
}

static int64_t most_rows(const Call *call) {
    return call->features > call->channels ? call->features : call->channels;
}

static int64_t panels_of(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }

static int is_mapped(const Map *map) { return map->kind != AS_IT_IS; }

static Head cut_head(const Call *call, int backward, int together, char **at) {
    const int64_t T = call->tokens + TOKENS, F = call->features, E = call->channels;
    const int64_t floats = T * (int64_t)sizeof(float);
    Head head = {0};
    if (call->log_decay.data) {
        if (call->per_channel) {
            head.channels = take_bytes(at, floats * row_stride(F));
            head.owed = take_bytes(at, row_stride(F) * (int64_t)sizeof(double));
        } else head.factor = take_bytes(at, floats);
    }
    head.chunks = take_bytes(at, T * (int64_t)sizeof(Chunk));
    head.keys = take_bytes(at, T * (int64_t)sizeof(Scores));
    if (!call->per_channel)
        head.settled = take_bytes(at, (together ? T : BLOCK) * (int64_t)sizeof(Settled));
    if (call->beta.data) {
        head.beta = take_bytes(at, floats);
        if (backward) {
            head.negative_beta = take_bytes(at, floats);
            head.error = take_bytes(at, floats * E);
            head.pull = take_bytes(at, floats * E);
        }
    }
    if (call->normaliser) {
        head.inverse = take_bytes(at, floats);
        head.total = take_bytes(at, row_stride(F) * (int64_t)sizeof(float));
        if (backward) head.slope = take_bytes(at, floats);
    }
    if (backward) for (int i = 0; i < 2; i++) head.silent[i] = take_bytes(at, T);
    if (backward) head.values = take_bytes(at, T * (int64_t)sizeof(Scores));
    if (backward && call->d_log_decay && !call->per_channel)
        head.sums = take_bytes(at, floats * panels_of(F));
    const Map *maps[2] = {&call->query_map, &call->key_map};
    const int64_t rows = together ? T : BLOCK * TOKENS;
    int64_t work = 0;
    for (int i = 0; i < 2; i++) if (is_mapped(maps[i])) {
        for (int turn = 0; turn < (together ? 1 : 2); turn++)
            head.made[i][turn] = take_bytes(at, rows * row_stride(F) * (int64_t)sizeof(float));
        if (map_floats(maps[i]) > work) work = map_floats(maps[i]);
    }
    head.map_work = take_bytes(at, work * (int64_t)sizeof(float));
    return head;
}

static int64_t blocks_of(int64_t chunks) { return (chunks + BLOCK - 1) / BLOCK; }

static int64_t end_of(const Head *head, int64_t block) {
    return (block + 1) * BLOCK < head->count ? (block + 1) * BLOCK : head->count;
}

static Panel *cut_panels(const Call *call, char **at, int measured) {
    const int64_t most = most_rows(call), stride = row_stride(most);
    const int64_t padded = TOKENS * stride * (int64_t)sizeof(float);
    const int64_t count = panels_of(most);
    Panel *panels = take_bytes(at, count * (int64_t)sizeof(Panel));
    for (int64_t p = 0; p < count; p++) {
        Walker w = {0};
        w.state = take_bytes(at, (most + 1) * VECTORS * (int64_t)sizeof(vector));
        w.read.stride = w.write.stride = stride;
        for (int i = 0; i < 2; i++) {
            w.read.rows[i] = take_bytes(at, padded);
            w.write.rows[i] = take_bytes(at, padded);
        }
        if (call->per_channel)
            w.prepared = take_bytes(at, prepared_floats(most) * (int64_t)sizeof(float));
        if (measured) panels[p].walker = w;
    }
    return panels;
}

/* States at the beginnings of blocks, per panel. A block has BLOCK tokens at least. */
static int64_t marks_of(const Call *call) {
    return (call->tokens / BLOCK + 1) * (most_rows(call) + 1) * VECTORS;
}

static Worker cut_worker(const Call *call, int backward, char **at, int measured) {
    const int64_t stride = row_stride(most_rows(call)), floats = (int64_t)sizeof(float);
    const int64_t panel = (most_rows(call) + 1) * VECTORS * (int64_t)sizeof(vector);
    Worker worker = {0};
    worker.panel = cut_panels(call, at, measured);
    worker.nothing = take_bytes(at, panel);
    worker.zeros = take_bytes(at, (stride + TOKENS) * floats);
    worker.ones = take_bytes(at, (stride + TOKENS) * floats);
    if (backward) worker.back = cut_panels(call, at, measured);
    if (backward && call->d_log_decay) {
        worker.marks = take_bytes(
            at, panels_of(call->features) * marks_of(call) * (int64_t)sizeof(vector)
        );
        worker.kept = take_bytes(at, BLOCK * panel);
        worker.entering = take_bytes(at, BLOCK * TOKENS * VECTORS * (int64_t)sizeof(vector));
    }
    return worker;
}

static void ready_worker(const Call *call, Worker *worker) {
    const int64_t most = most_rows(call), stride = row_stride(most);
    memset(worker->nothing, 0, (size_t)((most + 1) * VECTORS) * sizeof(vector));
    for (int64_t i = 0; i < stride + TOKENS; i++) worker->zeros[i] = 0, worker->ones[i] = 1;
    for (int64_t p = 0; p < panels_of(most); p++) {
        worker->panel[p].walker.nothing = worker->nothing;
        if (worker->back) worker->back[p].walker.nothing = worker->nothing;
    }
}

static Rows of_operand(const Operand *x, int64_t b, int64_t h) {
    return (Rows){operand_rows(x, b, h), x->token};
}

static Rows shifted(Rows rows, int64_t columns) { return (Rows){rows.at + columns, rows.step}; }

static Rows factors_of(const Call *call, const Head *head) {
    return (Rows){head->channels, row_stride(call->features)};
}

/* Sums of weights q_t . z_t of the tokens [first, stop), in their order, and z after the last. */
REGARD_SHARED void sum_weights(
    const Call *call, Head *head, int64_t n, int64_t first, int64_t stop, float *weight,
    float *last
) {
    const int64_t F = call->features, groups = row_stride(F) / REGARD_WIDTH;
    vector *z = head->total;
    if (first == 0) for (int64_t g = 0; g < groups; g++)
        z[g] = call->total ? part_load(call->total + n * F + g * REGARD_WIDTH, F - g * REGARD_WIDTH)
                           : (vector){0};
    for (int64_t t = first; t < stop; t++) {
        vector sum[2] = {{0}, {0}};
        const float *query = head->q.at + t * head->q.step, *key = head->k.at + t * head->k.step;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t c = g * REGARD_WIDTH;
            vector kept = z[g];
            if (head->factor) {
                const float factor = head->factor[t];
                kept = factor == 0 ? (vector){0} : factor * kept;
            } else if (head->channels) {
                const vector factor = v_load(head->channels + t * row_stride(F) + c);
                kept = v_keep((vector_mask)(factor != (vector){0}), factor * kept);
            }
            z[g] = kept + part_load(key + c, F - c);
            sum[g & 1] += part_load(query + c, F - c) * z[g];
        }
        weight[t] = v_sum(sum[0] + sum[1]) + (float)call->epsilon;
    }
    if (last && stop == call->tokens) for (int64_t g = 0; g < groups; g++)
        part_store(last + g * REGARD_WIDTH, z[g], F - g * REGARD_WIDTH);
}

/* The inverse of less than this may overflow: such rows are divided in two steps. */
#define LEAST_WEIGHT 1e-37f

static int is_tiny(const Call *call, float weight) {
    return call->normaliser == BY_SUM && weight != 0 && __builtin_fabsf(weight) < LEAST_WEIGHT;
}

/* What a sum of weights divides by, turned round: 0 where there is no weight at all. */
static float inverse_of(const Call *call, float weight) {
    if (call->normaliser == BY_CLAMP && weight <= (float)call->minimum)
        return (float)(1.0 / call->minimum);
    if (is_tiny(call, weight)) return 1 / LEAST_WEIGHT;
    return weight == 0 ? 0 : 1.0f / weight;
}

/* Decays, beta and chunks. */
static void ready_tokens(const Call *call, Head *head, int64_t b, int64_t hk) {
    const int64_t T = call->tokens, F = call->features;
    const Rows decay = of_operand(&call->log_decay, b, hk);
    if (head->factor) token_decays(decay.at, decay.step, T, head->factor);
    if (head->channels)
        channel_decays(decay.at, decay.step, T, F, row_stride(F), head->channels, head->owed);
    if (head->beta) {
        const Rows beta = of_operand(&call->beta, b, hk);
        for (int64_t t = 0; t < T; t++) head->beta[t] = beta.at[t * beta.step];
    }
    head->count = cut_chunks(T, head->factor, head->channels, row_stride(F), head->chunks);
}

/* The products of queries and keys, of keys with each other under the delta rule. */
static void ready_keys(
    const Call *call, Head *head, const float *zeros, int64_t first, int64_t last
) {
    all_scores(
        head->chunks + first, last - first, head->q, head->beta ? head->k : (Rows){0, 0}, head->k,
        factors_of(call, head), call->features, zeros, head->keys + first
    );
}

/* What straight runs need of the chunks [first, last), whose products are there. */
REGARD_SHARED void ready_straight(
    Head *head, const Scores *scores, Numbers by, int kinds, int64_t first, int64_t last
) {
    if (first == 0) head->left = 1;
    for (int64_t c = first; c < last; c++) {
        Settled *to = head->settled + (c - first);
        if (kinds > 1) settled_(0, 2, 0, head->chunks[c], scores + c, by, &head->left, to);
        else settled_(0, 1, 0, head->chunks[c], scores + c, by, &head->left, to);
    }
}

/* The same for runs towards the first token; with `carries` they are the delta rule's. */
REGARD_SHARED void ready_straight_back(
    Head *head, const Scores *scores, Numbers by, int carries, int64_t first, int64_t last
) {
    if (last == head->count) head->left = 1;
    for (int64_t c = last - 1; c >= first; c--) {
        Settled *to = head->settled + (c - first);
        if (carries) settled_(1, 2, 1, head->chunks[c], scores + c, by, &head->left, to);
        else settled_(1, 1, 0, head->chunks[c], scores + c, by, &head->left, to);
    }
}

/* Rows as the caller gave them. */
static void plain_rows(const Call *call, Head *head, int64_t b, int64_t h) {
    head->q = of_operand(&call->q, b, h);
    head->k = of_operand(&call->k, b, h / (call->heads / call->key_heads));
}

/* Rows of the tokens [start, stop), mapped where they are to be: in turn `turn` of the blocks, or
 * for good where there is one turn. */
REGARD_SHARED void map_block(
    const Call *call, Head *head, int64_t b, int64_t h, int64_t start, int64_t stop, int turn
) {
    const Map *maps[2] = {&call->query_map, &call->key_map};
    const int64_t heads[2] = {h, h / (call->heads / call->key_heads)}, F = row_stride(call->features);
    const Rows given[2] = {of_operand(&call->q, b, heads[0]), of_operand(&call->k, b, heads[1])};
    Rows *rows[2] = {&head->q, &head->k};
    for (int i = 0; i < 2; i++) if (is_mapped(maps[i])) {
        float *to = head->made[i][turn];
        map_rows(maps[i], given[i].at + start * given[i].step, given[i].step, heads[i],
                 stop - start, F, head->map_work, to);
        *rows[i] = (Rows){to - start * F, F};
    }
}

/* A run over the columns of S: rows are features. */
static Run over_values(const Call *call, const Head *head, const Worker *worker, int64_t column) {
    Run run = {0};
    const int64_t left = call->channels - column;
    run.rows = call->features;
    run.columns = left < COLUMNS ? left : COLUMNS;
    run.vectors = run.columns > REGARD_WIDTH ? 2 : 1;
    run.decay = head->factor ? ONE_DECAY : head->channels ? ROW_DECAY : NO_DECAY;
    run.factor = head->factor;
    run.factors = factors_of(call, head);
    run.beta = head->beta;
    run.chunks = head->chunks, run.scores = head->keys;
    run.zeros = worker->zeros, run.ones = worker->ones;
    return run;
}

/* A run over the columns of the transposed state: rows are value channels. */
REGARD_SHARED Run over_features(
    const Call *call, const Head *head, const Worker *worker, int64_t column
) {
    Run run = {0};
    const int64_t left = call->features - column;
    run.rows = call->channels;
    run.columns = left < COLUMNS ? left : COLUMNS;
    run.vectors = run.columns > REGARD_WIDTH ? 2 : 1;
    run.decay = head->factor ? ONE_DECAY : head->channels ? COLUMN_DECAY : NO_DECAY;
    run.factor = head->factor;
    if (head->channels) run.factors = shifted(factors_of(call, head), column);
    run.beta = head->beta;
    run.chunks = head->chunks, run.scores = head->values;
    run.zeros = worker->zeros, run.ones = worker->ones;
    return run;
}

/* A panel of rows [rows][width] from `column` on; zeros without rows. */
static void load_panel(const Run *run, const float *from, int64_t width, vector *state) {
    for (int64_t row = 0; row < run->rows; row++) for (int v = 0; v < run->vectors; v++)
        state[row * run->vectors + v] =
            from ? part_load(from + row * width + v * REGARD_WIDTH,
                             run->columns - v * REGARD_WIDTH)
                 : (vector){0};
}

static void store_panel(const Run *run, const vector *state, int64_t width, int add, float *to) {
    for (int64_t row = 0; row < run->rows; row++) for (int v = 0; v < run->vectors; v++) {
        float *at = to + row * width + v * REGARD_WIDTH;
        const int64_t left = run->columns - v * REGARD_WIDTH;
        vector x = state[row * run->vectors + v];
        if (add) x += part_load(at, left);
        part_store(at, x, left);
    }
}

static void forward_rows(const Head *head, Run *run, int64_t settled_from) {
    run->read[0] = head->q;
    run->write[0] = run->read[1] = head->k;
    run->settled_from = settled_from;
}

/* The run of the forward, over the panel at `column`. */
static Run forward_run(
    const Call *call, const Head *head, const Worker *worker, int64_t b, int64_t h, int64_t column
) {
    Run run = over_values(call, head, worker, column);
    const int64_t hk = h / (call->heads / call->key_heads);
    forward_rows(head, &run, 0);
    run.value[0] = shifted(of_operand(&call->v, b, hk), column);
    if (head->beta) run.rule = CORRECTS, run.second_read = 1;
    return run;
}

/* Sets a panel off, from a state [rows][width] at its first column or from zeros. */
static void start(Panel *panel, const float *state, int64_t width, int dot) {
    panel->walker.run = &panel->run;
    load_panel(&panel->run, state, width, panel->walker.state);
    begin(&panel->walker, dot);
}

#endif
