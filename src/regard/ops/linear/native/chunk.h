/* Runs of at most TOKENS tokens that go through a pass together, and their products.
 *
 * A token that forgets (a decay of exactly 0) starts a run: nothing inside one is then cut off.
 */
#ifndef LINEAR_CHUNK_H
#define LINEAR_CHUNK_H

#include "decays.h"
#include "reduce.h"

/* Chunks between asking for what lies beyond the L2 cache and reading it. Narrow vectors have work
 * enough to wait meanwhile (measured: they only lose by asking). */
#define AHEAD 4
#define WIDE_ENOUGH (REGARD_WIDTH >= 16)

typedef struct {
    int64_t start;
    int32_t count;
    int32_t forgets; /* some factor of its first token is 0 */
} Chunk;

/* Products of rows of two kinds, left [2] and right: of[kind][i][j] for i >= j, the later first. */
typedef struct {
    float of[2][TOKENS][TOKENS];
} Scores;

/* Fills `chunks` (of up to `tokens`) and returns how many there are. Factors: per token `factor`,
 * per channel `channels` [tokens][stride], or neither. */
REGARD_SHARED int64_t cut_chunks(
    int64_t tokens, const float *factor, const float *channels, int64_t stride, Chunk *chunks
) {
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; t++) {
        int forgets = 0;
        if (factor) forgets = factor[t] == 0;
        if (channels) {
            vector_mask zero = {0};
            for (int64_t c = 0; c < stride; c += REGARD_WIDTH)
                zero |= (vector_mask)(v_load(channels + t * stride + c) == (vector){0});
            forgets = v_any(zero);
        }
        if (count == 0 || forgets || chunks[count - 1].count == TOKENS)
            chunks[count++] = (Chunk){t, 0, forgets};
        chunks[count - 1].count++;
    }
    return count;
}

enum { PAIRS = TOKENS * (TOKENS + 1) / 2 };
#define SUMS ((PAIRS + REGARD_WIDTH - 1) / REGARD_WIDTH * REGARD_WIDTH)

/* `decayed`: rows of factors [token][channel] lie between the later token and the earlier one. */
INLINE void scores_(
    const int kinds, const int decayed, Chunk chunk, Rows left0, Rows left1, Rows right,
    Rows factors, int64_t channels, const float *zeros, Scores *scores
) {
    const float *l[2][TOKENS], *r[TOKENS], *g[TOKENS];
    EACH(i, TOKENS) {
        const int there = i < chunk.count;
        const int64_t t = chunk.start + i;
        l[0][i] = there ? left0.at + t * left0.step : zeros;
        l[1][i] = there && kinds > 1 ? left1.at + t * left1.step : zeros;
        r[i] = there ? right.at + t * right.step : zeros;
        g[i] = there && decayed ? factors.at + t * factors.step : zeros;
    }
    vector sum[2][SUMS];
    EACH(kind, kinds) EACH(i, SUMS) sum[kind][i] = (vector){0};
    for (int64_t c = 0; c < channels; c += REGARD_WIDTH) {
        const int64_t left = channels - c;
        vector key[TOKENS];
        EACH(j, TOKENS) key[j] = part_load(r[j] + c, left);
        EACH(i, TOKENS) {
            if (decayed && i > 0) {
                const vector factor = part_load(g[i] + c, left);
                EACH(j, i) key[j] *= factor;
            }
            EACH(kind, kinds) {
                const vector x = part_load(l[kind][i] + c, left);
                EACH(j, i + 1) sum[kind][i * (i + 1) / 2 + j] += x * key[j];
            }
        }
    }
    EACH(kind, kinds) {
        float flat[SUMS];
        EACH(part, SUMS / REGARD_WIDTH)
            v_store(flat + part * REGARD_WIDTH, v_sums(sum[kind] + part * REGARD_WIDTH));
        EACH(i, TOKENS) EACH(j, TOKENS)
            scores->of[kind][i][j] = j <= i ? flat[i * (i + 1) / 2 + j] : 0.0f;
    }
}

/* Asks for the rows of a later chunk. */
static inline void fetch_rows(Rows rows, int64_t start, int64_t channels) {
    fetch_ahead(rows.at + start * rows.step, rows.step, TOKENS, channels);
}

/* The products of all chunks; `left1` and `factors` may be of NULL. */
REGARD_SHARED void all_scores(
    const Chunk *chunks, int64_t count, Rows left0, Rows left1, Rows right, Rows factors,
    int64_t channels, const float *zeros, Scores *scores
) {
#define EACH_CHUNK_(kinds, decayed)                                                              \
    for (int64_t c = 0; c < count; c++) {                                                        \
        if (WIDE_ENOUGH && kinds > 1 && c + AHEAD < count) {                                     \
            fetch_rows(left0, chunks[c + AHEAD].start, channels);                                \
            fetch_rows(right, chunks[c + AHEAD].start, channels);                                \
        }                                                                                        \
        scores_(kinds, decayed, chunks[c], left0, left1, right, factors, channels, zeros,        \
                scores + c);                                                                     \
    }
    if (left1.at && factors.at) EACH_CHUNK_(2, 1)
    else if (left1.at) EACH_CHUNK_(2, 0)
    else if (factors.at) EACH_CHUNK_(1, 1)
    else EACH_CHUNK_(1, 0)
}

#endif
