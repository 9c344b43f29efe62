/* The forward of a call in which every query reads the state after all keys:
 *
 *     S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   o_i = phi(q_i) S / divisor(phi(q_i) z)
 *
 * or, `centred`, with the means m of mapped keys and u of values,
 *
 *     S = sum_j (phi(k_j) - m) (v_j - u)^T,   o_i = u + (scale / n) phi(q_i) S
 *
 * Keys are taken about the mean of those before them: with n keys before, m in a tile, and a, b
 * the tile's mean key and value about those of before, S grows by the tile's products less
 * m^2 / (n + m) a b^T. What is subtracted is never more than what is left, so no digit is lost to
 * an offset of all keys, and nothing is read twice.
 */
#include "whole.h"

static void add_plain(const Work *work, const Tiles *tiles, Sums sums, int64_t b, int64_t hk,
                      int64_t start, int64_t count) {
    const Whole *call = work->call;
    const int64_t D = work->features, E = work->channels;
    const float *k = rows_at(&call->k, b, hk) + start * call->k.token;
    const float *v = rows_at(&call->v, b, hk) + start * call->v.token;
    Left keys = {k, 1, call->k.token};
    int64_t v_step = call->v.token;
    if (call->key_map != MAP_IDENTITY || call->features != D || call->normaliser) {
        take(call->key_map, k, call->k.token, count, call->features, D, 0, tiles->left,
             call->normaliser ? sums.of_keys : 0);
        keys = (Left){tiles->left, 1, D};
    }
    if (call->channels != E) {
        take(MAP_IDENTITY, v, call->v.token, count, call->channels, E, 0, tiles->right, 0);
        v = tiles->right, v_step = E;
    }
    product_add(D, E, count, keys, v, v_step, sums.of_both, E);
}

static void add_centred(const Work *work, const Tiles *tiles, Sums sums, int64_t b, int64_t hk,
                        int64_t start, int64_t before, int64_t count) {
    const Whole *call = work->call;
    const int64_t D = work->features, E = work->channels;
    const float *k = rows_at(&call->k, b, hk) + start * call->k.token;
    const float *v = rows_at(&call->v, b, hk) + start * call->v.token;
    float *a = tiles->keys, *u = tiles->values;
    for (int again = before ? 1 : 0; again < 2; again++) { /* the first tile finds its mean first */
        memset(a, 0, (size_t)D * sizeof(float));
        memset(u, 0, (size_t)E * sizeof(float));
        take(call->key_map, k, call->k.token, count, call->features, D, sums.of_keys, tiles->left,
             a);
        take(MAP_IDENTITY, v, call->v.token, count, call->channels, E, sums.of_values,
             tiles->right, u);
        if (!again) {
            add_row(1.0f / (float)count, a, D, sums.of_keys);
            add_row(1.0f / (float)count, u, E, sums.of_values);
        }
    }
    product_add(D, E, count, (Left){tiles->left, 1, D}, tiles->right, E, sums.of_both, E);
    const float share = 1.0f / (float)(before + count);
    add_outer(-share, a, D, u, E, sums.of_both);
    add_row(share, a, D, sums.of_keys);
    add_row(share, u, E, sums.of_values);
}

/* The keys of one slice. */
static void sum_slice(const Work *work, const Tiles *tiles, int64_t number) {
    const Whole *call = work->call;
    const int64_t head = number / work->key_slices, slice = number % work->key_slices;
    const int64_t first = slice * work->key_slice;
    const int64_t stop = slice_end(slice, work->key_slice, call->keys);
    const Sums sums = sums_at(work, head, slice);
    memset(sums.of_both, 0, (size_t)sums_floats(work) * sizeof(float));
    for (int64_t start = first; start < stop; start += TILE) {
        const int64_t b = head / call->key_heads, hk = head % call->key_heads;
        const int64_t count = tile_count(start, stop);
        if (call->centred)
            add_centred(work, tiles, sums, b, hk, start, start - first, count);
        else add_plain(work, tiles, sums, b, hk, start, count);
    }
}

/* Joins slices, stores their sums, and makes the matrix that queries read. */
static void merge_slices(const Work *work, const Tiles *tiles, int64_t head) {
    const Whole *call = work->call;
    const int64_t D = work->features, E = work->channels;
    const Sums whole = sums_at(work, head, 0);
    for (int64_t slice = 1; slice < work->key_slices; slice++) {
        const Sums more = sums_at(work, head, slice);
        if (call->centred) {
            const int64_t before = slice * work->key_slice;
            const int64_t after = slice_end(slice, work->key_slice, call->keys);
            const float share = (float)(after - before) / (float)after;
            add_row(-1, whole.of_keys, D, more.of_keys);
            add_row(-1, whole.of_values, E, more.of_values);
            add_outer(share * (float)before, more.of_keys, D, more.of_values, E, whole.of_both);
            add_row(share, more.of_keys, D, whole.of_keys);
            add_row(share, more.of_values, E, whole.of_values);
        } else add_row(1, more.of_keys, D, whole.of_keys);
        add_row(1, more.of_both, D * E, whole.of_both);
    }
    if (call->state) {
        float *row = tiles->keys;
        for (int64_t d = 0; d < call->features; d++) {
            widen_row(call->state + (head * call->features + d) * call->channels, call->channels,
                      E, tiles->values);
            add_row(1, tiles->values, E, whole.of_both + d * E);
        }
        if (call->total) {
            widen_row(call->total + head * call->features, call->features, D, row);
            add_row(1, row, D, whole.of_keys);
        }
    }
    narrow(whole.of_both, call->features, call->channels, E,
           call->sums + head * call->features * call->channels);
    if (call->of_keys)
        memcpy(call->of_keys + head * call->features, whole.of_keys,
               (size_t)call->features * sizeof(float));
    if (call->of_values)
        memcpy(call->of_values + head * call->channels, whole.of_values,
               (size_t)call->channels * sizeof(float));
    float *matrix = matrix_at(work, head);
    const float share = share_of(call);
    for (int64_t i = 0; i < D * E; i += REGARD_WIDTH)
        v_store(matrix + i, share * v_load(whole.of_both + i));
}

static void divide_row(const Whole *call, float weight, float *row) {
    float again;
    const float inverse = inverse_weight(call, weight, &again);
    for (int64_t c = 0; c < call->channels; c += REGARD_WIDTH) {
        const int64_t left = call->channels - c;
        part_store(row + c, part_load(row + c, left) * inverse * again, left);
    }
}

/* The queries of one slice of a head. */
static void read_slice(const Work *work, const Tiles *tiles, int64_t number) {
    const Whole *call = work->call;
    const int64_t D = work->features, E = work->channels;
    const int64_t n = number / work->query_slices, slice = number % work->query_slices;
    const int64_t b = n / call->heads, h = n % call->heads;
    const int64_t head = b * call->key_heads + h / (call->heads / call->key_heads);
    const int64_t stop = slice_end(slice, work->query_slice, call->queries);
    const Sums sums = sums_at(work, head, 0);
    for (int64_t start = slice * work->query_slice; start < stop; start += TILE) {
        const int64_t count = tile_count(start, stop), whole = up_to(count, BLOCK_ROWS);
        const float *q = rows_at(&call->q, b, h) + start * call->q.token;
        float *out = call->out + (n * call->queries + start) * call->channels;
        Left queries = {q, call->q.token, 1};
        if (call->query_map != MAP_IDENTITY || call->features != D || whole != count) {
            take(call->query_map, q, call->q.token, count, call->features, D, 0, tiles->left, 0);
            fill_rows(tiles->left, count, D);
            queries = (Left){tiles->left, D, 1};
        }
        const int straight = call->channels == E && whole == count;
        float *to = straight ? out : tiles->result;
        product(whole, E, call->features, queries, matrix_at(work, head), E,
                call->centred ? sums.of_values : 0, to, E);
        if (!straight) narrow(to, count, call->channels, E, out);
        if (!call->normaliser) continue;
        const float scale = (float)call->scale;
        for (int64_t t = 0; t < count; t++) {
            const float *row = queries.at + t * queries.row;
            divide_row(call, scale * dot_rows(row, sums.of_keys, D), out + t * call->channels);
        }
    }
}

REGARD_EXPORT(int64_t, linear_whole_size)(void) { return sizeof(Whole); }

REGARD_EXPORT(int64_t, linear_whole)(const Whole *call) {
    Work shape = {.key_slices = slices_of(call->keys), .query_slices = slices_of(call->queries)};
    const int64_t key_heads = call->batch * call->key_heads, heads = call->batch * call->heads;
    const Round rounds[] = {
        {key_heads * shape.key_slices, sum_slice},
        {key_heads, merge_slices},
        {heads * shape.query_slices, read_slice},
    };
    return run_rounds(call, rounds, 3, 0);
}
