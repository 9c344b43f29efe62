/* The backward of `whole.c`. With w the divisors, g_i = do_i / w_i and lost_i = -o_i . g_i (0 where
 * a divisor is clamped; without a normaliser w = 1, lost = 0),
 *
 *     dphi(q_i) = scale (S g_i + lost_i z),   A = dS + scale sum_i phi(q_i) g_i^T
 *     dphi(k_j) = A v_j + dz + scale sum_i lost_i phi(q_i),    dv_j = A^T phi(k_j)
 *
 * and `centred`, with scale / n in the place of scale and Y = du + sum_i do_i,
 *
 *     dphi(k_j) = A (v_j - u) + dm / n,    dv_j = A^T (phi(k_j) - m) + Y / n
 */
#include "whole.h"

/* to [columns][rows filled up] from [rows][columns filled up]. */
static void transpose(
    const float *from, int64_t rows, int64_t columns, int64_t from_stride, float factor,
    int64_t stride, float *to
) {
    memset(to, 0, (size_t)(up_to(columns, REGARD_WIDTH) * stride) * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            to[c * stride + r] = factor * from[r * from_stride + c];
}

static void ready_head(const Work *work, const Tiles *tiles, int64_t head) {
    const Whole *call = work->call;
    (void)tiles;
    transpose(call->sums + head * call->features * call->channels, call->features, call->channels,
              call->channels, share_of(call), work->features, transposed_at(work, head));
}

/* rows of dx from those of x and of dphi [count][stride]. */
INLINE void put_(
    const int map, const float *x, int64_t step, int64_t count, int64_t width,
    const float *gradient, int64_t stride, float *dx
) {
    for (int64_t t = 0; t < count; t++) for (int64_t c = 0; c < width; c += REGARD_WIDTH) {
        const int64_t left = width - c;
        const vector at = part_load(x + t * step + c, left);
        const vector found = slope_(map, at, map == MAP_ELU || map == MAP_EXP ? map_(map, at) : at,
                                    v_load(gradient + t * stride + c));
        part_store(dx + t * width + c, found, left);
    }
}

static void put_gradient(
    int64_t map, const float *x, int64_t step, int64_t count, int64_t width,
    const float *gradient, int64_t stride, float *dx
) {
    switch (map) {
        case MAP_RELU: put_(MAP_RELU, x, step, count, width, gradient, stride, dx); break;
        case MAP_ELU: put_(MAP_ELU, x, step, count, width, gradient, stride, dx); break;
        case MAP_LEAKY: put_(MAP_LEAKY, x, step, count, width, gradient, stride, dx); break;
        case MAP_EXP: put_(MAP_EXP, x, step, count, width, gradient, stride, dx); break;
        default: put_(MAP_IDENTITY, x, step, count, width, gradient, stride, dx);
    }
}

/* g in the place of do, and the inverse of every divisor. */
static void divide_rows(
    const Work *work, const Tiles *tiles, const float *z, int64_t count, float *inverse,
    uint8_t *flat
) {
    const Whole *call = work->call;
    for (int64_t t = 0; t < count; t++) {
        const float weight =
            (float)call->scale * dot_rows(tiles->left + t * work->features, z, work->features);
        float again, *row = tiles->right + t * work->channels;
        inverse[t] = inverse_weight(call, weight, &again);
        for (int64_t c = 0; c < work->channels; c += REGARD_WIDTH)
            v_store(row + c, v_load(row + c) * inverse[t] * again);
        inverse[t] *= again;
        flat[t] = weight == 0 ||
                  (call->normaliser == BY_CLAMP && weight <= (float)call->minimum);
    }
}

/* The queries that read key head `head`, in one slice: dq, and their part of A, dz and Y. */
static void query_slice(const Work *work, const Tiles *tiles, int64_t number) {
    const Whole *call = work->call;
    const int64_t D = work->features, E = work->channels;
    const int64_t head = number / work->query_slices, slice = number % work->query_slices;
    const int64_t b = head / call->key_heads, hk = head % call->key_heads;
    const int64_t group = call->heads / call->key_heads;
    const int64_t stop = slice_end(slice, work->query_slice, call->queries);
    const Sums sums = sums_at(work, head, slice);
    float *z = tiles->keys, inverse[TILE];
    uint8_t flat[TILE];
    memset(sums.of_both, 0, (size_t)sums_floats(work) * sizeof(float));
    if (call->normaliser)
        widen_row(call->of_keys + head * call->features, call->features, D, z);
    for (int64_t h = hk * group; h < (hk + 1) * group; h++)
        for (int64_t start = slice * work->query_slice; start < stop; start += TILE) {
            const int64_t count = tile_count(start, stop), whole = up_to(count, BLOCK_ROWS);
            const float *q = rows_at(&call->q, b, h) + start * call->q.token;
            const float *d_out = rows_at(&call->d_out, b, h) + start * call->d_out.token;
            float *dq = call->dq + ((b * call->heads + h) * call->queries + start) *
                                       call->features;
            take(call->query_map, q, call->q.token, count, call->features, D, 0, tiles->left, 0);
            take(MAP_IDENTITY, d_out, call->d_out.token, count, call->channels, E, 0,
                 tiles->right, sums.of_values);
            fill_rows(tiles->right, count, E);
            if (call->normaliser) divide_rows(work, tiles, z, count, inverse, flat);
            product(whole, D, call->channels, (Left){tiles->right, E, 1},
                    transposed_at(work, head), D, 0, tiles->result, D);
            for (int64_t t = 0; call->normaliser && t < count; t++) {
                const float *row = tiles->left + t * D;
                float *back = tiles->result + t * D;
                const float lost = flat[t] ? 0 : -dot_rows(row, back, D) * inverse[t];
                if (lost == 0) continue;
                add_row((float)call->scale * lost, z, D, back);
                add_row(lost, row, D, sums.of_keys);
            }
            product_add(D, E, count, (Left){tiles->left, 1, D}, tiles->right, E, sums.of_both, E);
            put_gradient(call->query_map, q, call->q.token, count, call->features, tiles->result,
                         D, dq);
        }
}

/* A and the rows that are added to every key's and value's gradient. */
static void merge_queries(const Work *work, const Tiles *tiles, int64_t head) {
    const Whole *call = work->call;
    const int64_t D = work->features, E = work->channels;
    const float keys = call->keys > 0 ? (float)call->keys : 1;
    const Sums whole = sums_at(work, head, 0);
    for (int64_t slice = 1; slice < work->query_slices; slice++)
        add_row(1, sums_at(work, head, slice).of_both, sums_floats(work), whole.of_both);
    const float share = share_of(call);
    float *A = matrix_at(work, head);
    for (int64_t d = 0; d < D; d++) {
        if (d < call->features)
            widen_row(call->d_sums + (head * call->features + d) * call->channels,
                      call->channels, E, A + d * E);
        else memset(A + d * E, 0, (size_t)E * sizeof(float));
    }
    add_row(share, whole.of_both, D * E, A);
    transpose(A, call->features, call->channels, E, 1, D, transposed_at(work, head));
    float *row = tiles->keys;
    if (call->normaliser || call->centred) {
        widen_row(call->d_of_keys + head * call->features, call->features, D, row);
        for (int64_t d = 0; d < D; d++)
            whole.of_keys[d] = call->centred ? row[d] / keys
                                             : row[d] + (float)call->scale * whole.of_keys[d];
    }
    if (call->centred) {
        widen_row(call->d_of_values + head * call->channels, call->channels, E, tiles->values);
        for (int64_t e = 0; e < E; e++)
            whole.of_values[e] = (whole.of_values[e] + tiles->values[e]) / keys;
    }
    if (call->d_state)
        narrow(A, call->features, call->channels, E,
               call->d_state + head * call->features * call->channels);
    if (call->d_total)
        memcpy(call->d_total + head * call->features, whole.of_keys,
               (size_t)call->features * sizeof(float));
}

/* dk and dv of one slice. */
static void key_slice(const Work *work, const Tiles *tiles, int64_t number) {
    const Whole *call = work->call;
    const int64_t D = work->features, E = work->channels;
    const int64_t head = number / work->key_slices, slice = number % work->key_slices;
    const int64_t b = head / call->key_heads, hk = head % call->key_heads;
    const int64_t stop = slice_end(slice, work->key_slice, call->keys);
    const Sums sums = sums_at(work, head, 0);
    const float *m = 0, *u = 0;
    if (call->centred) {
        widen_row(call->of_keys + head * call->features, call->features, D, tiles->keys);
        widen_row(call->of_values + head * call->channels, call->channels, E, tiles->values);
        m = tiles->keys, u = tiles->values;
    }
    for (int64_t start = slice * work->key_slice; start < stop; start += TILE) {
        const int64_t count = tile_count(start, stop), whole = up_to(count, BLOCK_ROWS);
        const float *k = rows_at(&call->k, b, hk) + start * call->k.token;
        const float *v = rows_at(&call->v, b, hk) + start * call->v.token;
        const int64_t row = head * call->keys + start;
        take(call->key_map, k, call->k.token, count, call->features, D, m, tiles->left, 0);
        take(MAP_IDENTITY, v, call->v.token, count, call->channels, E, u, tiles->right, 0);
        fill_rows(tiles->left, count, D);
        fill_rows(tiles->right, count, E);
        product(whole, D, call->channels, (Left){tiles->right, E, 1}, transposed_at(work, head), D,
                call->normaliser || call->centred ? sums.of_keys : 0, tiles->result, D);
        product(whole, E, call->features, (Left){tiles->left, D, 1}, matrix_at(work, head), E,
                call->centred ? sums.of_values : 0, tiles->more, E);
        put_gradient(call->key_map, k, call->k.token, count, call->features, tiles->result, D,
                     call->dk + row * call->features);
        narrow(tiles->more, count, call->channels, E, call->dv + row * call->channels);
    }
}

REGARD_EXPORT(int64_t, linear_whole_gradient)(const Whole *call) {
    const int64_t key_heads = call->batch * call->key_heads;
    const Round rounds[] = {
        {key_heads, ready_head},
        {key_heads * slices_of(call->queries), query_slice},
        {key_heads, merge_queries},
        {key_heads * slices_of(call->keys), key_slice},
    };
    return run_rounds(call, rounds, 4, 1);
}
