/* What a kernel of this folder is told; library.py has the same fields.
 *
 * Numbers are float32, indices int32. Rows are dense in their channels. The tokens of a key head
 * lie on `places`, `chunk` to a chunk; places of chunk 0 may belong to tokens of an earlier call.
 */
#ifndef RAT_CALL_H
#define RAT_CALL_H

#include <stdint.h>

typedef struct {
    const float *data;
    int64_t batch, head, row;
} Rows;

typedef struct {
    int64_t batch, heads, key_heads, queries, places, channels, chunk, threads;
    int64_t past;        /* slots of finished chunks of earlier calls, [B, Hk, past, D] */
    int64_t offset;      /* query i stands at place i + offset, unless `place` says otherwise */
    int64_t place_rows;  /* rows of `place`, a divisor of batch; 0: none */
    int64_t count_rows;  /* of `past_count`; 0: all slots are in use */
    int64_t table_rows;  /* of `cosine` and `sine`; 0: nothing is turned */
    double scale;
    Rows q, k, v;        /* q as it came; k and v averaged, [B, Hk, places, D] */
    const float *past_k, *past_v;
    const int32_t *place, *past_count; /* [place_rows][queries], [count_rows] */
    const float *cosine, *sine;        /* [table_rows][chunks][D / 2] */
    float *out, *lse;                  /* [B, H, T, D] and [B, H, T], of base 2 */
} Call;

typedef struct {
    Call call;           /* `out` and `lse` are those of the forward */
    Rows grad;
    float *dq, *dk, *dv; /* dk and dv come as zeros */
    float *d_past_k, *d_past_v;
} Backward;

/* The chunk-wise average of x under the gate g: [B, Hk, places, D]. */
typedef struct {
    int64_t batch, heads, places, channels, chunk, threads;
    Rows x, gate, result, grad; /* result: of the forward; grad: of the result */
    const float *carry;         /* [B, Hk, D], where chunk 0 had got to */
    float *out, *d_x, *d_gate, *d_carry;
} Scan;

#endif
