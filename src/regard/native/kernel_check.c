/* What the shared headers promise, in functions small enough for a test to call. */
#include "exp.h"
#include "panel.h"
#include "threads.h"

/* out[i] = 2^x[i]. */
REGARD_EXPORT(void, exp2_check)(const float *x, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i += REGARD_WIDTH) {
        float part[REGARD_WIDTH] = {0};
        for (int64_t j = 0; j < REGARD_WIDTH && i + j < count; j++) part[j] = x[i + j];
        v_store(part, v_exp2(v_load(part)));
        for (int64_t j = 0; j < REGARD_WIDTH && i + j < count; j++) out[i + j] = part[j];
    }
}

/* The rows of a tile. */
REGARD_EXPORT(int64_t, lanes_check)(void) { return LANES; }

/* With keys [count][channels] less `centre`, packed in blocks of `block`, and for every lane
 * p [count][LANES], x [channels][LANES] and constant [LANES]:
 *     t [count][LANES] = p (keys . x + constant)        y [channels][LANES] = sum_key keys t
 * `half` is the kind of the keys, `index` picks some rows, or is NULL. */
REGARD_EXPORT(int64_t, panel_check)
(const void *keys, int64_t half, const int32_t *index, int64_t count, int64_t channels,
 int64_t block, const float *centre, const float *x, const float *p, const float *constant,
 int64_t cut, float *t, float *y) {
    const Panel panel = panel_of(block, channels);
    const int64_t padded = panel.groups * REGARD_ROWS, blocks = panel_blocks(panel, count);
    const int64_t row = sizeof(lanes);
    char *at = 0;
    take_bytes(&at, panel.floats * 4);
    take_bytes(&at, 2 * padded * row);
    take_bytes(&at, 2 * block * row);
    char *space = aligned_block((intptr_t)at);
    if (!space) return REGARD_NO_MEMORY;
    at = space;
    float *packed = take_bytes(&at, panel.floats * 4);
    lanes *in = take_bytes(&at, 2 * padded * row), *out = in + padded;
    lanes *weights = take_bytes(&at, 2 * block * row), *products = weights + block;
    memset(in, 0, (size_t)(2 * padded * row));
    memcpy(in, x, (size_t)(channels * row));
    lanes add;
    memcpy(&add, constant, sizeof add);
    const Source from = {keys, 0, channels, 1, (int)half};
    for (int64_t number = 0; number < blocks; number++) {
        const int64_t start = number * block, left = count - start;
        const int64_t seen = left < block ? left : block;
        panel_pack(packed, panel, number, from, channels, index, count, centre);
        memset(weights, 0, (size_t)(block * row));
        memcpy(weights, p + start * LANES, (size_t)(seen * row));
        const int64_t looked_at = up_to(seen, REGARD_ROWS);
        panel_weigh(
            REGARD_VECTORS, packed, panel, looked_at, (const lanes *)in, add,
            (const lanes *)weights, products, cut || seen < looked_at
        );
        panel_collect(REGARD_VECTORS, packed, panel, looked_at, (const lanes *)products, out);
        memcpy(t + start * LANES, products, (size_t)(seen * row));
    }
    memcpy(y, out, (size_t)(channels * row));
    free_block(space);
    return 0;
}

typedef struct {
    Team team;
    int64_t rounds, count;
    int64_t *counters, *seen;
} Rounds;

/* Adds up, round by round, what all threads did in the round before. */
static void add_up(void *shared, int64_t thread) {
    Rounds *rounds = shared;
    for (int64_t round = 0; round < rounds->rounds; round++) {
        int64_t next;
        while ((next = take_next(rounds->counters + round)) < rounds->count) {
            const int64_t before = round ? rounds->seen[(round - 1) * rounds->count + next] : 0;
            rounds->seen[round * rounds->count + next] = before + next;
        }
        team_barrier(&rounds->team);
    }
    (void)thread;
}

/* seen [rounds][count]: (round + 1) * number, however many threads share the work; `counters`
 * are `rounds` zeros. Returns the threads that took part. */
REGARD_EXPORT(int64_t, threads_check)
(int64_t threads, int64_t rounds, int64_t count, int64_t *counters, int64_t *seen) {
    Rounds all = {.rounds = rounds, .count = count, .counters = counters, .seen = seen};
    run_team(&all.team, threads, add_up, &all);
    return all.team.count;
}
