/* The forward: every query reads the state after its own key.
 *
 * All panels of a head's state go through a block of tokens, then through the next. Query heads
 * that share a key head walk it one after the other.
 */
#include "jobs.h"

static void ready_weights(
    const Call *call, Head *head, int64_t b, int64_t h, int64_t first, int64_t stop, float *weight
) {
    const int64_t group = call->heads / call->key_heads;
    const int64_t nk = b * call->key_heads + h / group;
    float *last = call->last_total && h % group == 0 ? call->last_total + nk * call->features : 0;
    sum_weights(call, head, nk, first, stop, weight, last);
    for (int64_t t = first; t < stop; t++) head->inverse[t] = inverse_of(call, weight[t]);
}

/* All that panels share of the chunks [first, last): rows, their products, sums of weights. */
static void ready_block(
    const Call *call, Head *head, const Worker *worker, int64_t b, int64_t h, int64_t first,
    int64_t last, int turn
) {
    if (first == last) return;
    const Chunk end = head->chunks[last - 1];
    const int64_t start = head->chunks[first].start, stop = end.start + end.count;
    const int64_t n = b * call->heads + h;
    map_block(call, head, b, h, start, stop, turn);
    if (call->normaliser)
        ready_weights(call, head, b, h, start, stop, call->weight + n * call->tokens);
    ready_keys(call, head, worker->zeros, first, last);
    if (head->settled) {
        const Numbers by = {head->factor, head->beta, head->inverse};
        ready_straight(head, head->keys, by, 1 + (head->beta != 0), first, last);
    }
}

/* The second step of dividing the rows whose weight is tiny, in a panel's columns. */
static void divide_again(const Call *call, const float *weight, float *out, int64_t column) {
    const int64_t E = call->channels, stop = column + COLUMNS < E ? column + COLUMNS : E;
    for (int64_t t = 0; t < call->tokens; t++) if (is_tiny(call, weight[t])) {
        const float rest = weight[t] / LEAST_WEIGHT;
        for (int64_t c = column; c < stop; c++) out[t * E + c] /= rest;
    }
}

static void walk_head(
    const Call *call, Head *head, Worker *worker, const Crew *crew, int64_t b, int64_t h
) {
    const int64_t group = call->heads / call->key_heads, hk = h / group, T = call->tokens;
    const int64_t n = b * call->heads + h, nk = b * call->key_heads + hk;
    const int64_t F = call->features, E = call->channels;
    const int alone = !crew->team;
    if (crew->member == 0) {
        plain_rows(call, head, b, h);
        ready_tokens(call, head, b, hk);
        if (!alone) ready_block(call, head, worker, b, h, 0, head->count, 0);
    }
    crew_wait(crew);
    for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
        const int64_t column = p * COLUMNS;
        Panel *panel = worker->panel + p;
        panel->run = forward_run(call, head, worker, b, h, column);
        panel->run.seen = (Output){call->out + n * T * E + column, E, head->inverse, 0};
        panel->run.settled = head->settled;
        if (alone && p == 0) {
            panel->run.ahead[0] = of_operand(&call->q, b, h);
            panel->run.ahead[1] = of_operand(&call->k, b, hk);
            panel->run.tokens = T;
            panel->run.width = is_mapped(&call->key_map) ? call->key_map.inner : F;
        }
        start(panel, call->state ? call->state + nk * F * E + column : 0, E, 0);
    }
    for (int64_t block = 0; block < blocks_of(head->count); block++) {
        const int64_t first = block * BLOCK, last = end_of(head, block);
        if (alone) ready_block(call, head, worker, b, h, first, last, block % 2);
        for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
            forward_rows(head, &worker->panel[p].run, alone ? first : 0);
            steps(&worker->panel[p].walker, first, last);
        }
    }
    if (call->normaliser) for (int64_t p = crew->member; p < panels_of(E); p += crew->members)
        divide_again(call, call->weight + n * T, call->out + n * T * E, p * COLUMNS);
    if (!call->last_state || h % group) return; /* the first of a group brings it */
    for (int64_t p = crew->member; p < panels_of(E); p += crew->members) {
        Panel *panel = worker->panel + p;
        flush(&panel->walker);
        float *to = call->last_state + nk * F * E + p * COLUMNS;
        store_panel(&panel->run, panel->walker.state, E, 0, to);
    }
}

REGARD_EXPORT(int64_t, linear_call_size)(void) { return sizeof(Call); }

REGARD_EXPORT(int64_t, linear_walk)(const Call *call) {
    return run_heads(call, call->heads, 0, walk_head);
}
