/* The gated average inside every chunk, and its gradient; see call.h.
 *
 *     h_t = g_t h_(t-1) + (1 - g_t) x_t,   h = 0 before a chunk, `carry` before chunk 0
 *
 * Channels are independent and rows are read front to back, so plain loops over the channels
 * run at the speed of the memory.
 */
#include "call.h"
#include "memory.h"
#include "threads.h"
#include "vector.h"

typedef struct {
    const Scan *scan;
    int64_t next;
    int backward;
    Team team;
} Shared;

static const float *row_of(Rows rows, int64_t b, int64_t h, int64_t i) {
    return rows.data + b * rows.batch + h * rows.head + i * rows.row;
}

static void average(
    int64_t channels, const float *restrict g, const float *restrict x,
    const float *restrict before, float *restrict h
) {
    for (int64_t c = 0; c < channels; c++) h[c] = g[c] * before[c] + (1 - g[c]) * x[c];
}

static void begin(
    int64_t channels, const float *restrict g, const float *restrict x, float *restrict h
) {
    for (int64_t c = 0; c < channels; c++) h[c] = (1 - g[c]) * x[c];
}

static void forward_head(const Scan *s, int64_t b, int64_t h) {
    const int64_t D = s->channels;
    float *out = s->out + (b * s->heads + h) * s->places * D;
    const float *before = s->carry + (b * s->heads + h) * D;
    for (int64_t i = 0; i < s->places; i++, before = out, out += D) {
        const float *g = row_of(s->gate, b, h, i), *x = row_of(s->x, b, h, i);
        if (i && i % s->chunk == 0) begin(D, g, x, out);
        else average(D, g, x, before, out);
    }
}

/* r = grad + (what comes back from the next token); r <- g r. */
static void back(
    int64_t channels, const float *restrict g, const float *restrict x,
    const float *restrict before, const float *restrict grad, float *restrict r,
    float *restrict d_x, float *restrict d_gate
) {
    for (int64_t c = 0; c < channels; c++) {
        const float all = r[c] + grad[c];
        d_x[c] = (1 - g[c]) * all;
        d_gate[c] = (before[c] - x[c]) * all;
        r[c] = g[c] * all;
    }
}

static void backward_head(const Scan *s, int64_t b, int64_t h) {
    const int64_t D = s->channels, head = b * s->heads + h, first = head * s->places * D;
    float *r = s->d_carry + head * D, zero[64] = {0};
    for (int64_t c = 0; c < D; c++) r[c] = 0;
    for (int64_t i = s->places - 1; i >= 0; i--) {
        const float *g = row_of(s->gate, b, h, i), *x = row_of(s->x, b, h, i);
        const float *grad = row_of(s->grad, b, h, i);
        float *d_x = s->d_x + first + i * D, *d_gate = s->d_gate + first + i * D;
        if (i && i % s->chunk == 0) {
            for (int64_t c = 0; c < D; c += 64) {
                const int64_t n = D - c < 64 ? D - c : 64;
                back(n, g + c, x + c, zero, grad + c, r + c, d_x + c, d_gate + c);
            }
            for (int64_t c = 0; c < D; c++) r[c] = 0;
            continue;
        }
        const float *before = i ? row_of(s->result, b, h, i - 1) : s->carry + head * D;
        back(D, g, x, before, grad, r, d_x, d_gate);
    }
}

static void work(void *shared, int64_t thread) {
    Shared *all = shared;
    const Scan *s = all->scan;
    (void)thread;
    for (int64_t n; (n = take_next(&all->next)) < s->batch * s->heads;)
        (all->backward ? backward_head : forward_head)(s, n / s->heads, n % s->heads);
}

static void run(const Scan *scan, int backward) {
    Shared all = {.scan = scan, .backward = backward};
    const int64_t heads = scan->batch * scan->heads;
    run_team(&all.team, scan->threads < heads ? scan->threads : heads, work, &all);
}

REGARD_EXPORT(int64_t, rat_scan_forward)
(const Scan *scan) {
    run(scan, 0);
    return 0;
}

REGARD_EXPORT(int64_t, rat_scan_backward)
(const Scan *scan) {
    run(scan, 1);
    return 0;
}

REGARD_EXPORT(int64_t, rat_scan_size)
(void) { return sizeof(Scan); }
