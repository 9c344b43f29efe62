/* The backward, exact, by the same walks with their roles exchanged.
 *
 * With S_t = g_t S_{t-1} + k_t u_t^T, o_t = S_t^T q_t, and D_t the gradient of S_t,
 *
 *     D_t = q_t do_t^T + g_{t+1} (D_{t+1} - k_{t+1} dv_{t+1}^T)       dv = 0 without the delta rule
 *     du_t = D_t^T k_t              over the columns of S, backwards in time
 *     dq_t = S_t do_t               over the columns of the transposed state
 *     dk_t = D_t u_t - g_t S_{t-1} dv_t     the same, backwards for D, forwards for S
 *
 * and under the delta rule u = beta e, e = v - g S_{t-1}^T k, dv = beta du, dbeta = du . e.
 * The divisor of normalised rows is one more row of the transposed state, whose value is 1.
 *
 * The gradient of a log decay is the sum of all that passes it (`decay_gradient`): it needs S and
 * D of one moment, so S is walked again, block by block from the last, from states kept at the
 * blocks' beginnings; a panel at a time, which keeps few of them.
 */
#include "jobs.h"

static int64_t key_head(const Call *call, int64_t h) { return h / (call->heads / call->key_heads); }

/* Which tokens nothing is asked of: rows of zeros. Whatever a later key holds, and should it make
 * the state infinite, reaches no gradient through 0 times infinity. */
static void find_silent(Rows rows, int64_t width, int64_t first, int64_t last, uint8_t *silent) {
    for (int64_t t = first; t < last; t++) {
        vector_mask any = {0};
        for (int64_t c = 0; c < width; c += REGARD_WIDTH)
            any |= (vector_mask)(part_load(rows.at + t * rows.step + c, width - c) != (vector){0});
        silent[t] = !v_any(any);
    }
}

static void silence(const Head *head, Scores *scores, int kind, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; c++) {
        const Chunk chunk = head->chunks[c];
        for (int i = 0; i < chunk.count; i++) if (head->silent[kind][chunk.start + i])
            memset(scores[c].of[kind][i], 0, sizeof scores[c].of[kind][i]);
    }
}

/* 1 / divisor of every row and the slope of its weight times the divisor, -do . out. */
static void ready_divisors(const Call *call, Head *head, int64_t b, int64_t h) {
    const int64_t E = call->channels, T = call->tokens;
    const float *weight = call->given_weight + (b * call->heads + h) * T;
    const Rows grad = of_operand(&call->d_out, b, h), out = of_operand(&call->given_out, b, h);
    memset(head->slope + T, 0, TOKENS * sizeof(float));
    for (int64_t t = 0; t < T; t++) {
        vector sum = {0};
        for (int64_t c = 0; c < E; c += REGARD_WIDTH) {
            const vector d = part_load(grad.at + t * grad.step + c, E - c);
            const vector o = part_load(out.at + t * out.step + c, E - c);
            sum += v_keep((vector_mask)(d != (vector){0}), d * o); /* 0 times infinity is 0 */
        }
        head->inverse[t] = inverse_of(call, weight[t]);
        const int flat = call->normaliser == BY_CLAMP ? weight[t] <= (float)call->minimum
                                                      : weight[t] == 0;
        head->slope[t] = flat || head->silent[0][t] ? 0 : -v_sum(sum);
        if (head->silent[0][t]) head->inverse[t] = 0;
    }
}

static void ready_silenced_keys(
    const Call *call, Head *head, const float *zeros, int64_t first, int64_t last
) {
    ready_keys(call, head, zeros, first, last);
    silence(head, head->keys, 0, first, last);
}

/* Whether a query head adds to what an earlier one of its group has left. */
static int adds(const Call *call, int64_t h) { return h % (call->heads / call->key_heads) > 0; }

/* e of the delta rule, from the forward walk once more. */
static void walk_errors(
    const Call *call, Head *head, Worker *worker, const Crew *crew, int64_t b, int64_t h
) {
    const int64_t nk = b * call->key_heads + key_head(call, h);
    const int64_t F = call->features, E = call->channels;
    for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
        const int64_t column = p * COLUMNS;
        Panel *panel = worker->panel + p;
        panel->run = forward_run(call, head, worker, b, h, column);
        panel->run.blind = 1;
        panel->run.missed = (Output){head->error + column, E, 0, 0};
        if (!crew->team) panel->run.settled = head->settled;
        start(panel, call->state ? call->state + nk * F * E + column : 0, E, 0);
    }
    for (int64_t block = 0; block < blocks_of(head->count); block++) {
        const int64_t first = block * BLOCK, last = end_of(head, block);
        if (!crew->team) {
            ready_silenced_keys(call, head, worker->zeros, first, last);
            const Numbers by = {head->factor, head->beta, 0};
            if (head->settled) ready_straight(head, head->keys, by, 2, first, last);
        }
        for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
            worker->panel[p].run.settled_from = first;
            steps(&worker->panel[p].walker, first, last);
        }
    }
}

static Run back_values_run(
    const Call *call, const Head *head, const Worker *worker, int64_t b, int64_t h, int64_t column
) {
    const int64_t hk = key_head(call, h), nk = b * call->key_heads + hk;
    const int64_t T = call->tokens, E = call->channels;
    Run run = over_values(call, head, worker, column);
    const Rows k = of_operand(&call->k, b, hk);
    const Output dv = {call->dv + nk * T * E + column, E, 0, adds(call, h)};
    run.mirror = 1;
    run.read[0] = k;
    run.write[0] = of_operand(&call->q, b, h);
    run.value[0] = shifted(of_operand(&call->d_out, b, h), column);
    if (head->beta) {
        run.rule = CARRIES, run.second_write = 1, run.write[1] = k;
        run.seen = (Output){head->pull + column, E, 0, 0};
        run.missed = dv;
    } else {
        run.seen = dv;
        run.value_scale[0] = head->inverse;
    }
    return run;
}

/* dv, under the delta rule du too, and the gradient of the first state. */
static void walk_back_values(
    const Call *call, Head *head, Worker *worker, const Crew *crew, int64_t b, int64_t h
) {
    const int64_t nk = b * call->key_heads + key_head(call, h);
    const int64_t F = call->features, E = call->channels;
    const float *last = adds(call, h) ? 0 : call->d_last_state;
    for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
        const int64_t column = p * COLUMNS;
        Panel *panel = worker->panel + p;
        panel->run = back_values_run(call, head, worker, b, h, column);
        if (!crew->team) panel->run.settled = head->settled;
        start(panel, last ? last + nk * F * E + column : 0, E, 0);
    }
    for (int64_t block = blocks_of(head->count) - 1; block >= 0; block--) {
        const int64_t first = block * BLOCK, last = end_of(head, block);
        if (!crew->team && (!head->beta || adds(call, h)))
            ready_silenced_keys(call, head, worker->zeros, first, last);
        if (!crew->team && head->settled) {
            const Numbers by = {head->factor, head->beta ? head->beta : head->inverse, 0};
            ready_straight_back(head, head->keys, by, head->beta != 0, first, last);
        }
        for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
            worker->panel[p].run.settled_from = first;
            steps(&worker->panel[p].walker, first, last);
        }
    }
    if (!call->d_state) return;
    for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
        Panel *panel = worker->panel + p;
        flush(&panel->walker);
        float *to = call->d_state + nk * F * E + p * COLUMNS;
        store_panel(&panel->run, panel->walker.state, E, adds(call, h), to);
    }
}

/* Products of do and du with u between tokens, and dbeta. */
static void ready_values(
    const Call *call, Head *head, const float *zeros, int64_t b, int64_t h, int64_t first,
    int64_t last
) {
    const int64_t hk = key_head(call, h), E = call->channels;
    const Rows grad = of_operand(&call->d_out, b, h), none = {0, 0};
    const Rows error = {head->error, E}, pull = {head->pull, E};
    const int delta = head->beta != 0;
    all_scores(
        head->chunks + first, last - first, grad, delta ? pull : none,
        delta ? error : of_operand(&call->v, b, hk), none, E, zeros, head->values + first
    );
    silence(head, head->values, 0, first, last);
    if (delta) {
        const Chunk end = head->chunks[last - 1];
        const int64_t start = head->chunks[first].start;
        find_silent(pull, E, start, end.start + end.count, head->silent[1]);
        silence(head, head->values, 1, first, last);
    }
    float *d_beta = delta ? call->d_beta + (b * call->key_heads + hk) * call->tokens : 0;
    for (int64_t c = first; c < last; c++) {
        const Chunk chunk = head->chunks[c];
        Scores *scores = head->values + c;
        for (int i = 0; i < chunk.count; i++) {
            const int64_t t = chunk.start + i;
            const float slope = head->slope ? head->slope[t] : 0;
            for (int j = 0; slope != 0 && j <= i; j++) scores->of[0][i][j] += slope;
            if (!delta) continue;
            const float found = scores->of[1][i][i];
            d_beta[t] = adds(call, h) ? d_beta[t] + found : found;
            head->negative_beta[t] = -head->beta[t];
        }
    }
}

/* The two walks over a panel of the transposed state: `gather` brings dq and S's part of dk,
 * `scatter` D's part of dk. Keys are what is written into S. */
typedef struct {
    Panel *gather, *scatter;
    Rows key;
    const float *key_scale;
    int64_t b, h, column;
} Pair;

static Pair pair_of(
    const Call *call, const Head *head, Worker *worker, int64_t b, int64_t h, int64_t p
) {
    const int64_t column = p * COLUMNS;
    const int64_t n = b * call->heads + h, hk = key_head(call, h), nk = b * call->key_heads + hk;
    const int64_t T = call->tokens, F = call->features, E = call->channels;
    const Rows grad = of_operand(&call->d_out, b, h);
    const Rows q = shifted(of_operand(&call->q, b, h), column);
    const Rows k = shifted(of_operand(&call->k, b, hk), column);
    const Output dq = {call->dq + n * T * F + column, F, head->inverse, 0};
    Output dk = {call->dk + nk * T * F + column, F, 0, adds(call, h)};
    Pair pair = {worker->panel + p, worker->back + p, k, 0, b, h, column};
    Run *gather = &pair.gather->run, *scatter = &pair.scatter->run;
    *gather = *scatter = over_features(call, head, worker, column);
    scatter->mirror = 1;
    gather->silent[0] = head->silent[0];
    if (head->beta) gather->silent[1] = head->silent[1];
    gather->read[0] = scatter->write[0] = grad;
    gather->value[0] = k;
    gather->seen = dq;
    scatter->value[0] = q;
    scatter->value_scale[0] = head->inverse;
    if (head->beta) {
        const Rows error = {head->error, E}, pull = {head->pull, E};
        gather->second_read = scatter->second_write = 1;
        gather->write[0] = scatter->read[0] = error;
        gather->read[1] = scatter->write[1] = pull;
        gather->value_scale[0] = pair.key_scale = head->beta;
        gather->missed = dk;
        gather->missed.scale = head->negative_beta;
        scatter->value[1] = k;
        scatter->value_scale[1] = head->negative_beta;
        dk.scale = head->beta, dk.add = 1;
    } else {
        gather->write[0] = scatter->read[0] = of_operand(&call->v, b, hk);
    }
    scatter->seen = dk;
    if (call->normaliser) {
        const Rows slope = {head->slope, 1}, one = {worker->ones, 0};
        gather->extra = scatter->extra = 1;
        gather->read_extra = scatter->write_extra = slope;
        gather->write_extra = scatter->read_extra = one;
    }
    return pair;
}

/* The transposed panel of a state [F, E] and of a sum of weights [F]. */
static void load_transposed(
    const Run *run, const float *from, const float *total, vector *state
) {
    float *to = (float *)state;
    const int64_t width = run->vectors * REGARD_WIDTH;
    memset(state, 0, (size_t)((run->rows + run->extra) * run->vectors) * sizeof(vector));
    for (int64_t c = 0; c < run->columns; c++) {
        if (from) for (int64_t row = 0; row < run->rows; row++)
            to[row * width + c] = from[c * run->rows + row];
        if (run->extra && total) to[run->rows * width + c] = total[c];
    }
}

static void start_transposed(
    const Call *call, const Pair *pair, Panel *panel, const float *state, const float *total,
    int dot
) {
    const int64_t n = pair->b * call->key_heads + key_head(call, pair->h), F = call->features;
    const int64_t row = n * F + pair->column;
    panel->walker.run = &panel->run;
    load_transposed(
        &panel->run, state ? state + row * call->channels : 0, total ? total + row : 0,
        panel->walker.state
    );
    begin(&panel->walker, dot);
}

static void start_gather(const Call *call, const Pair *pair) {
    start_transposed(call, pair, pair->gather, call->state, call->total, 0);
}

static void start_scatter(const Call *call, const Pair *pair, int dot) {
    const int more = adds(call, pair->h);
    start_transposed(
        call, pair, pair->scatter, more ? 0 : call->d_last_state, more ? 0 : call->d_last_total,
        dot
    );
    const Run *run = &pair->scatter->run;
    Walker *w = &pair->scatter->walker;
    w->awake = 0;
    for (int64_t i = 0; i < (run->rows + run->extra) * run->vectors; i++)
        w->awake |= v_any((vector_mask)(w->state[i] != (vector){0}));
}

/* The gradient of the sum of weights at the beginning. */
static void finish_scatter(const Call *call, const Pair *pair) {
    if (!call->d_total) return;
    Walker *w = &pair->scatter->walker;
    flush(w);
    const int64_t n = pair->b * call->key_heads + key_head(call, pair->h);
    const Run *run = w->run;
    float *to = call->d_total + n * call->features + pair->column;
    const float *from = (const float *)(w->state + run->rows * run->vectors);
    for (int64_t c = 0; c < run->columns; c++)
        to[c] = adds(call, pair->h) ? to[c] + from[c] : from[c];
}

/* value[i] of a chunk's token, scaled, at the panel; zeros where there is no such token. */
static void lanes_of(
    const Run *run, Rows rows, const float *scale, Chunk chunk, int i, vector *x
) {
    EACH(v, VECTORS) x[v] = (vector){0};
    if (i >= chunk.count) return;
    const int64_t t = chunk.start + i;
    for (int v = 0; v < run->vectors; v++) {
        x[v] = part_load(rows.at + t * rows.step + v * REGARD_WIDTH,
                         run->columns - v * REGARD_WIDTH);
        if (scale) x[v] *= scale[t];
    }
}

static void decay_of(const Run *run, Chunk chunk, int i, vector *d) {
    EACH(v, VECTORS) d[v] = (vector){0} + 1.0f;
    if (i >= chunk.count) return;
    if (run->decay == ONE_DECAY) EACH(v, VECTORS) d[v] = v_broadcast(run->factor[chunk.start + i]);
    else if (run->decay == COLUMN_DECAY) lanes_of(run, run->factors, 0, chunk, i, d);
}

/* What enters a chunk's tokens from before it: q (S do) and, negative, k (S dv). */
static void note_entering(const Pair *pair, Chunk chunk, const Sweep *s, vector *entering) {
    const Run *run = &pair->scatter->run;
    for (int i = 0; i < TOKENS; i++) {
        vector first[VECTORS], second[VECTORS];
        lanes_of(run, run->value[0], run->value_scale[0], chunk, i, first);
        if (run->second_write)
            lanes_of(run, run->value[1], run->value_scale[1], chunk, i, second);
        for (int v = 0; v < VECTORS; v++) {
            vector sum = v < run->vectors ? first[v] * s->sum[0][i][v] : (vector){0};
            if (run->second_write && v < run->vectors) sum += second[v] * s->sum[1][i][v];
            entering[i * VECTORS + v] = sum;
        }
    }
}

/* A step decays what goes from a token before it, or the state before the chunk, to it or a token
 * after it, or the state after the chunk. Sums of terms of their own, no differences: nothing
 * cancels, and a step that forgets has a gradient of exactly 0. */
static void decay_gradient(
    const Pair *pair, Chunk chunk, const Scores *scores, const Sweep *s, const vector *entering,
    vector found[TOKENS][VECTORS]
) {
    const Run *run = &pair->scatter->run;
    vector step[TOKENS][VECTORS], first[TOKENS][VECTORS], second[TOKENS][VECTORS];
    vector key[TOKENS][VECTORS], whole[VECTORS];
    EACH(v, VECTORS) whole[v] = v < run->vectors ? s->product[v] : (vector){0};
    for (int i = 0; i < TOKENS; i++) {
        decay_of(run, chunk, i, step[i]);
        lanes_of(run, run->value[0], run->value_scale[0], chunk, i, first[i]);
        if (run->second_write)
            lanes_of(run, run->value[1], run->value_scale[1], chunk, i, second[i]);
        lanes_of(run, pair->key, pair->key_scale, chunk, i, key[i]);
        EACH(v, VECTORS) whole[v] *= step[i][v];
    }
    EACH(v, VECTORS) {
        vector tail = whole[v];
        for (int i = TOKENS - 1; i >= 0; i--) {
            tail += entering[i * VECTORS + v];
            found[i][v] = tail;
        }
        for (int j = 0; j < chunk.count; j++) {
            vector inside[TOKENS] = {{0}}, passed = (vector){0} + 1.0f;
            for (int i = j + 1; i < chunk.count; i++) {
                passed *= step[i][v];
                vector sum = first[i][v] * scores->of[0][i][j];
                if (run->second_write) sum += second[i][v] * scores->of[1][i][j];
                inside[i] = passed * key[j][v] * sum;
            }
            tail = v < run->vectors ? key[j][v] * s->sum[0][j][v] : (vector){0};
            for (int i = chunk.count - 1; i > j; i--) {
                tail += inside[i];
                found[i][v] += tail;
            }
        }
    }
    if (!chunk.forgets) return;
    EACH(v, VECTORS) found[0][v] = v_keep((vector_mask)(step[0][v] != (vector){0}), found[0][v]);
}

/* Adds what a panel found to the gradient of the log decay. */
static void put_decay_gradient(
    const Call *call, const Pair *pair, Chunk chunk, vector found[TOKENS][VECTORS], float *sums
) {
    const Run *run = &pair->scatter->run;
    const int64_t nk = pair->b * call->key_heads + key_head(call, pair->h);
    const int more = adds(call, pair->h);
    for (int i = 0; i < chunk.count; i++) {
        const int64_t t = chunk.start + i;
        if (run->decay == ONE_DECAY) {
            vector sum = {0};
            for (int v = 0; v < run->vectors; v++) {
                int64_t left = run->columns - v * REGARD_WIDTH;
                float lanes[REGARD_WIDTH];
                v_store(lanes, found[i][v]);
                sum += part_load(lanes, left);
            }
            sums[t] = v_sum(sum);
            continue;
        }
        const Output out = {
            call->d_log_decay + nk * call->tokens * call->features + pair->column, call->features,
            0, more,
        };
        lane_put(run, &out, t, run->vectors, found[i]);
    }
}

/* Goes forwards once, keeping the state at the beginning of every block. */
static void mark_blocks(const Head *head, const Pair *pair, vector *marks) {
    Walker *w = &pair->gather->walker;
    const int64_t size = (w->run->rows + w->run->extra) * w->run->vectors;
    Run states = *w->run; /* the same walk without its results */
    states.seen.at = states.missed.at = 0;
    states.second_read = 0;
    w->run = &states;
    begin(w, 0);
    w->pass = w->flush;
    for (int64_t block = 0; block < blocks_of(head->count); block++) {
        flush(w);
        memcpy(marks + block * size, w->state, (size_t)size * sizeof(vector));
        if (block + 1 < blocks_of(head->count)) steps(w, block * BLOCK, end_of(head, block));
    }
    w->run = &pair->gather->run;
}

static void wake(const Head *head, Walker *back, Chunk chunk) {
    for (int64_t t = chunk.start; t < chunk.start + chunk.count; t++)
        back->awake |= !head->silent[0][t] || (head->beta && !head->silent[1][t]);
}

/* Both walks over one block, with S of every chunk at hand when D meets it. */
static void walk_block(
    const Call *call, const Head *head, Worker *worker, const Pair *pair, int64_t block,
    const vector *marks, float *sums
) {
    Walker *w = &pair->gather->walker, *back = &pair->scatter->walker;
    const int64_t size = (w->run->rows + w->run->extra) * w->run->vectors;
    const int64_t first = block * BLOCK, last = end_of(head, block);
    pair->gather->run.keeps = pair->scatter->run.keeps = 1;
    begin(w, 0);
    for (int64_t c = first; c < last; c++) {
        vector *kept = worker->kept + (c - first) * size;
        step_between(w, c, c == first ? marks + block * size : kept - size, kept);
        note_entering(
            pair, head->chunks[c], &w->sweep, worker->entering + (c - first) * TOKENS * VECTORS
        );
    }
    for (int64_t c = last - 1; c >= first; c--) {
        vector found[TOKENS][VECTORS];
        back->sweep.beside = worker->kept + (c - first) * size;
        step(back, c);
        if (!back->awake) memset(back->sweep.product, 0, sizeof back->sweep.product);
        wake(head, back, head->chunks[c]);
        decay_gradient(
            pair, head->chunks[c], head->values + c, &back->sweep,
            worker->entering + (c - first) * TOKENS * VECTORS, found
        );
        put_decay_gradient(call, pair, head->chunks[c], found, sums);
    }
}

/* dq, dk, and the gradients of the log decay and the first sum of weights. */
static void walk_features(
    const Call *call, Head *head, Worker *worker, const Crew *crew, int64_t b, int64_t h
) {
    const int64_t blocks = blocks_of(head->count), count = panels_of(call->features);
    const int alone = !crew->team, marked = call->d_log_decay != 0;
    for (int64_t p = crew->member; p < count; p += crew->members) {
        const Pair pair = pair_of(call, head, worker, b, h, p);
        start_gather(call, &pair);
        if (marked) mark_blocks(head, &pair, worker->marks + p * marks_of(call));
        start_scatter(call, &pair, marked);
    }
    for (int64_t i = 0; !marked && i < blocks; i++) {
        if (alone)
            ready_values(call, head, worker->zeros, b, h, i * BLOCK, end_of(head, i));
        for (int64_t p = crew->member; p < count; p += crew->members)
            steps(&worker->panel[p].walker, i * BLOCK, end_of(head, i));
    }
    for (int64_t i = blocks - 1; i >= 0; i--) {
        if (alone && marked)
            ready_values(call, head, worker->zeros, b, h, i * BLOCK, end_of(head, i));
        for (int64_t p = crew->member; p < count; p += crew->members) {
            if (!marked) {
                steps(&worker->back[p].walker, i * BLOCK, end_of(head, i));
                continue;
            }
            const Pair pair = {
                worker->panel + p, worker->back + p,
                shifted(of_operand(&call->k, b, key_head(call, h)), p * COLUMNS), head->beta, b, h,
                p * COLUMNS,
            };
            float *sums = head->sums ? head->sums + p * call->tokens : 0;
            walk_block(call, head, worker, &pair, i, worker->marks + p * marks_of(call), sums);
        }
    }
    for (int64_t p = crew->member; p < count; p += crew->members) {
        const Pair pair = {worker->panel + p, worker->back + p, {0, 0}, 0, b, h, p * COLUMNS};
        finish_scatter(call, &pair);
    }
}

static void sum_panels(const Call *call, const Head *head, int64_t b, int64_t h) {
    const int64_t T = call->tokens;
    float *to = call->d_log_decay + (b * call->key_heads + key_head(call, h)) * T;
    for (int64_t t = 0; t < T; t++) {
        float sum = adds(call, h) ? to[t] : 0;
        for (int64_t p = 0; p < panels_of(call->features); p++) sum += head->sums[p * T + t];
        to[t] = sum;
    }
}

/* All gradients of a key head, from its query heads one after the other. */
static void gradient_head(
    const Call *call, Head *head, Worker *worker, const Crew *crew, int64_t b, int64_t hk
) {
    const int64_t group = call->heads / call->key_heads;
    const int lead = crew->member == 0, shares = lead && crew->team;
    for (int64_t h = hk * group; h < (hk + 1) * group; h++) {
        crew_wait(crew);
        if (lead) {
            plain_rows(call, head, b, h);
            ready_tokens(call, head, b, hk);
            const Rows grad = of_operand(&call->d_out, b, h);
            find_silent(grad, call->channels, 0, call->tokens, head->silent[0]);
            if (call->normaliser) ready_divisors(call, head, b, h);
        }
        if (shares) ready_silenced_keys(call, head, worker->zeros, 0, head->count);
        crew_wait(crew);
        if (call->beta.data && !adds(call, h)) walk_errors(call, head, worker, crew, b, h);
        walk_back_values(call, head, worker, crew, b, h);
        crew_wait(crew);
        if (shares) ready_values(call, head, worker->zeros, b, h, 0, head->count);
        crew_wait(crew);
        walk_features(call, head, worker, crew, b, h);
        crew_wait(crew);
        if (lead && head->sums) sum_panels(call, head, b, h);
    }
}

REGARD_EXPORT(int64_t, linear_gradient)(const Call *call) {
    return run_heads(call, call->key_heads, 1, gradient_head);
}
