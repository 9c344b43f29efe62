/* What `Reduce` sums up, from a block of scores, in one reading: the weights of a row are formed
 * where they are needed and are gone with the next row.
 */
#include <math.h>
#include <string.h>

#include "exp.h"
#include "largest.h"
#include "memory.h"

/* Scores [batch][heads][rows][keys]: some queries of a call that has `queries` of them. Of what is
 * to be found, null where nobody asks. */
typedef struct {
    int64_t batch, heads, rows, keys, queries, wanted;
    const float *scores;
    const uint8_t *real; /* [batch][queries]: whether a query counts, from the first of the rows */
    double *entropy;     /* [heads] */
    float *received;     /* [batch][heads][keys] */
    float *shares;       /* [heads][...], by key less query; from the place of the last row on */
    int64_t shares_step; /* from head to head */
    float *map;          /* [batch][queries][keys], from the first of the rows: mean over heads */
    float *top;          /* [batch][heads][queries][wanted], from the first of the rows */
    int32_t *places;
} Call;

REGARD_EXPORT(int64_t, lens_sums_call_size)(void) { return sizeof(Call); }

/* to[0 .. count) = or += scale * from, which is aligned and padded. */
static inline void put(float *to, const float *from, float scale, int64_t count, const int add) {
    int64_t j = 0;
    for (; j + REGARD_WIDTH <= count; j += REGARD_WIDTH) {
        const vector part = scale * *(const vector *)(from + j);
        v_store(to + j, add ? v_load(to + j) + part : part);
    }
    for (; j < count; j++) to[j] = add ? to[j] + scale * from[j] : scale * from[j];
}

/* The exponentials e^(s - max s) of a row, zeros behind them; what they sum up to, and with s. */
static inline double exponentials(
    const float *scores, int64_t keys, vector tail, float *e, float *total
) {
    const int64_t whole = keys / REGARD_WIDTH * REGARD_WIDTH;
    vector largest = tail;
    for (int64_t j = 0; j < whole; j += REGARD_WIDTH) largest = v_max(v_load(scores + j), largest);
    const vector shift = v_broadcast(v_top(largest)), least = v_broadcast(-1e30f);
    vector sum = {0}, product = {0};
    for (int64_t j = 0; j < keys; j += REGARD_WIDTH) {
        const vector s = (j < whole ? v_load(scores + j) : tail) - shift;
        const vector power = v_exp2(s * (float)REGARD_LOG2E);
        *(vector *)(e + j) = power;
        sum += power;
        product += power * v_max(least, s); /* (0 times infinity would be no number) */
    }
    *total = v_sum(sum);
    return v_sum(product);
}

/* 0, or REGARD_NO_MEMORY. */
REGARD_EXPORT(int64_t, lens_sums)(const Call *call) {
    const int64_t keys = call->keys, left = keys % REGARD_WIDTH;
    float *e = aligned_block(up_to(keys, REGARD_WIDTH) * (int64_t)sizeof(float));
    if (!e) return REGARD_NO_MEMORY;
    const float *scores = call->scores;
    for (int64_t b = 0; b < call->batch; b++)
        for (int64_t h = 0; h < call->heads; h++)
            for (int64_t row = 0; row < call->rows; row++, scores += keys) {
                const int64_t place = (b * call->heads + h) * call->queries + row;
                float *map = call->map ? call->map + (b * call->queries + row) * keys : 0;
                float *top = call->top ? call->top + place * call->wanted : 0;
                int32_t *places = call->top ? call->places + place * call->wanted : 0;
                if (call->real && !call->real[b * call->queries + row]) {
                    if (map && !h) memset(map, 0, (size_t)keys * sizeof(float));
                    for (int64_t n = 0; top && n < call->wanted; n++) top[n] = 0, places[n] = n;
                    continue;
                }
                vector tail = v_broadcast(-__builtin_inff());
                memcpy(&tail, scores + keys - left, (size_t)left * sizeof(float));
                float total;
                const double product = exponentials(scores, keys, tail, e, &total);
                const float scale = 1 / total;
                if (call->entropy) call->entropy[h] += log(total) - product / total;
                if (call->received)
                    put(call->received + (b * call->heads + h) * keys, e, scale, keys, 1);
                if (call->shares)
                    put(call->shares + h * call->shares_step + call->rows - 1 - row, e, scale, keys, 1);
                if (map) {
                    const float mean = scale / (float)call->heads;
                    if (h) put(map, e, mean, keys, 1);
                    else put(map, e, mean, keys, 0);
                }
                if (top) {
                    largest_of_row(e, keys, call->wanted, top, places);
                    for (int64_t n = 0; n < call->wanted; n++) top[n] *= scale;
                }
            }
    free_block(e);
    return 0;
}
