/* The backward of local linear attention: tiles of queries as in the forward, and sums of what they
 * send to keys and values.
 *
 * The tiles of each key head are dealt out to a number of shares that depends on their count alone;
 * every share has sums of its own, and these are added in order. So the result does not depend on
 * how many threads there are.
 */
#include "contribution.h"
#include "threads.h"

#define MOST_SHARES 4
#define TILES_PER_SHARE 16
#define BACKWARD_BYTES ((int64_t)8 << 20) /* of heads and their sums at once, per thread */

typedef struct {
    const Backward *back;
    Team team;
    Keys *keys;       /* [key heads of a wave] */
    Share *share;     /* [key heads of a wave][slots] */
    Space *spaces;    /* [threads] */
    int64_t wave;     /* key heads at once */
    int64_t shares;   /* of the tiles of a key head */
    int64_t slots;    /* shares at once: all with several threads */
    int64_t sets, per_set, blocks; /* of biases; tiles of a set; blocks of keys */
    int64_t counters[];            /* [waves][counters_of] */
} Plan;

static void clear_share(const Plan *plan, const Share *share) {
    const Call *call = &plan->back->call;
    const int64_t keys = plan->blocks * block_keys(call->channels);
    memset(share->k, 0, (size_t)(keys * in_vectors(call->channels)) * sizeof(float));
    memset(share->v, 0, (size_t)(keys * in_vectors(call->value_channels)) * sizeof(float));
    if (share->columns) memset(share->columns, 0, (size_t)(plan->sets * keys) * sizeof(double));
}

static int64_t rounds_of(const Plan *plan) {
    return (plan->shares + plan->slots - 1) / plan->slots;
}

static int64_t counters_of(const Plan *plan) { return 2 + 2 * rounds_of(plan); }

/* Adds `count` shares of one block of a key head to the results, in order, the `first` to 0. */
static void gather_shares(
    const Plan *plan, const Keys *keys, const Share *share, int64_t count, int first, int64_t block
) {
    const Backward *back = plan->back;
    const Call *call = &back->call;
    const int64_t size = block_keys(call->channels), all = plan->blocks * size;
    const int64_t width = in_vectors(call->channels), width_v = in_vectors(call->value_channels);
    const int64_t head = keys->b * call->key_heads + keys->h;
    for (int64_t j = block * size; j < (block + 1) * size && j < keys->count; j++) {
        const int64_t place = head * call->keys + place_of(keys, j);
        for (int64_t c = 0; c < call->channels && back->wants_k; c++) {
            float *to = back->k + place * call->channels + c, sum = first ? 0 : *to;
            for (int64_t s = 0; s < count; s++) sum += share[s].k[j * width + c];
            *to = sum;
        }
        for (int64_t c = 0; c < call->value_channels && back->wants_v; c++) {
            float *to = back->v + place * call->value_channels + c, sum = first ? 0 : *to;
            for (int64_t s = 0; s < count; s++) sum += share[s].v[j * width_v + c];
            *to = sum;
        }
        for (int64_t set = 0; set < plan->sets && back->columns; set++) {
            /* Of heads that share a set the first stands for all. */
            const int64_t group = call->heads / call->key_heads;
            const int64_t of = keys->h * group + set * (group / plan->sets);
            double *to =
                back->columns + (keys->b * call->heads + of) * call->keys + place_of(keys, j);
            double sum = first ? 0 : *to;
            for (int64_t s = 0; s < count; s++) sum += share[s].columns[set * all + j];
            *to = sum;
        }
    }
}

static void work(void *shared, int64_t thread) {
    Plan *plan = shared;
    const Backward *back = plan->back;
    const Call *call = &back->call;
    const int64_t all = call->batch * call->key_heads, tiles = plan->per_set * plan->sets;
    int64_t *counters = plan->counters, next;
    for (int64_t start = 0; start < all; start += plan->wave, counters += counters_of(plan)) {
        const int64_t count = all - start < plan->wave ? all - start : plan->wave;
        while ((next = take_next(counters)) < count)
            keys_prepare(
                plan->keys + next, call, (start + next) / call->key_heads,
                (start + next) % call->key_heads
            );
        team_barrier(&plan->team);
        while ((next = take_next(counters + 1)) < count * plan->blocks) {
            keys_pack(plan->keys + next / plan->blocks, call, next % plan->blocks);
            outer_pack(plan->keys + next / plan->blocks, call, next % plan->blocks);
        }
        team_barrier(&plan->team);
        for (int64_t round = 0; round < rounds_of(plan); round++) {
            const int64_t first = round * plan->slots, left = plan->shares - first;
            const int64_t now = left < plan->slots ? left : plan->slots;
            while ((next = take_next(counters + 2 + 2 * round)) < count * now) {
                const int64_t head = next / now;
                const Share *share = plan->share + head * plan->slots + next % now;
                clear_share(plan, share);
                for (int64_t one = first + next % now; one < tiles; one += plan->shares)
                    do_tile(
                        plan->spaces + thread, back, plan->keys + head, one / plan->per_set,
                        one % plan->per_set, share
                    );
            }
            team_barrier(&plan->team);
            while ((next = take_next(counters + 3 + 2 * round)) < count * plan->blocks) {
                const int64_t head = next / plan->blocks;
                gather_shares(
                    plan, plan->keys + head, plan->share + head * plan->slots, now, round == 0,
                    next % plan->blocks
                );
            }
            team_barrier(&plan->team);
        }
    }
}

static void share_lay_out(const Plan *plan, Share *share, char **at) {
    const Call *call = &plan->back->call;
    const int64_t keys = plan->blocks * block_keys(call->channels);
    *share = (Share){0};
    share->k = take_bytes(at, keys * in_vectors(call->channels) * 4);
    share->v = take_bytes(at, keys * in_vectors(call->value_channels) * 4);
    if (plan->back->columns) share->columns = take_bytes(at, plan->sets * keys * 8);
}

/* Computes the gradients of a call; REGARD_NO_MEMORY if it could not. */
REGARD_EXPORT(int64_t, local_linear_backward)
(const Backward *back) {
    const Call *call = &back->call;
    const int64_t fold = folded_heads(call), all = call->batch * call->key_heads;
    if (!all || !call->queries || !call->keys) return 0;
    const int64_t outer = products_to_pack(back), threads = call->threads > 1 ? call->threads : 1;
    Plan sizes = {.back = back};
    sizes.sets = call->heads / call->key_heads / fold;
    sizes.per_set = (call->queries * fold + LANES - 1) / LANES;
    sizes.blocks = (call->keys + block_keys(call->channels) - 1) / block_keys(call->channels);
    sizes.shares = sizes.sets * sizes.per_set / TILES_PER_SHARE;
    if (sizes.shares < 1) sizes.shares = 1;
    if (sizes.shares > MOST_SHARES) sizes.shares = MOST_SHARES;
    sizes.slots = threads > 1 ? sizes.shares : 1;
    Keys one;
    Space space;
    Share share;
    char *head_end = 0, *space_end = 0, *share_end = 0;
    keys_lay_out(&one, call, outer, &head_end);
    space_lay_out(&space, back, &space_end);
    share_lay_out(&sizes, &share, &share_end);
    /* With several threads as many heads as fit, at least one share for each thread. */
    const int64_t head_bytes = (intptr_t)head_end + sizes.slots * (intptr_t)share_end;
    if (threads > 1) sizes.wave = BACKWARD_BYTES * threads / (head_bytes + 1);
    if (sizes.wave * sizes.slots < threads) sizes.wave = (threads + sizes.slots - 1) / sizes.slots;
    if (sizes.wave > all) sizes.wave = all;
    const int64_t waves = (all + sizes.wave - 1) / sizes.wave, parts = sizes.wave * sizes.slots;
    const int64_t counters_bytes = waves * counters_of(&sizes) * 8;
    const int64_t plan_bytes = aligned_bytes((int64_t)sizeof(Plan) + counters_bytes);
    const int64_t keys_bytes = aligned_bytes(sizes.wave * (int64_t)sizeof(Keys));
    const int64_t share_bytes = aligned_bytes(parts * (int64_t)sizeof(Share));
    const int64_t spaces_bytes = aligned_bytes(threads * (int64_t)sizeof(Space));
    char *memory = aligned_block(
        plan_bytes + keys_bytes + share_bytes + spaces_bytes + sizes.wave * (intptr_t)head_end +
        parts * (intptr_t)share_end + threads * (intptr_t)space_end
    );
    if (!memory) return REGARD_NO_MEMORY;
    char *at = memory;
    Plan *plan = take_bytes(&at, plan_bytes);
    *plan = sizes;
    plan->keys = take_bytes(&at, keys_bytes);
    plan->share = take_bytes(&at, share_bytes);
    plan->spaces = take_bytes(&at, spaces_bytes);
    for (int64_t i = 0; i < plan->wave; i++) keys_lay_out(plan->keys + i, call, outer, &at);
    for (int64_t i = 0; i < parts; i++) share_lay_out(plan, plan->share + i, &at);
    for (int64_t i = 0; i < threads; i++) space_lay_out(plan->spaces + i, back, &at);
    memset(plan->counters, 0, (size_t)counters_bytes);
    run_team(&plan->team, threads, work, plan);
    free_block(memory);
    return 0;
}

/* Bytes of the structure that Python has to fill in. */
REGARD_EXPORT(int64_t, local_linear_backward_size)
(void) { return sizeof(Backward); }
