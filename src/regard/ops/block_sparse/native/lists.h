/* The list of one block of queries: which rows some of them see, in the order of their tokens. */
#ifndef BLOCK_SPARSE_LISTS_H
#define BLOCK_SPARSE_LISTS_H

#include <limits.h>
#include <string.h>

#include "call.h"
#include "memory.h"

#define MOST_LEVELS 4
#define UNBOUNDED (INT32_MAX - 1) /* the token that nothing lies behind */

/* Row j covers tokens first[j] .. last[j]; a query sees rows inside its reach. With `pools`, row[j]
 * is the first of them. */
typedef struct {
    int64_t count;
    int coarse; /* some row covers several tokens */
    int32_t *row, *first, *last; /* [rows of a list + some] */
    const int8_t *mask;          /* [count][mask_width], or NULL */
    uint64_t *named;             /* of BLOCKS: a bit for each block of keys, all 0 between lists */
} List;

static inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
static inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

static inline int64_t key_blocks(const Call *call) {
    return (call->keys + call->block_k - 1) / call->block_k;
}

/* No list is longer: a block gives at most as many rows as it has tokens. */
static inline int64_t longest_list(const Call *call) {
    if (call->kind != BOXES) return call->keys;
    int64_t most = 0;
    for (int64_t i = 0; i < call->lists; i++) {
        int64_t count = 0;
        for (int64_t n = call->offsets[i]; n < call->offsets[i + 1]; n++) count += call->length[n];
        most = larger(most, count);
    }
    return most;
}

static inline void list_lay_out(List *list, const Call *call, int64_t longest, char **at) {
    *list = (List){0};
    list->row = take_bytes(at, longest * 4);
    list->first = take_bytes(at, longest * 4);
    list->last = take_bytes(at, longest * 4);
    if (call->kind == BLOCKS) list->named = take_bytes(at, (key_blocks(call) + 63) / 64 * 8);
}

/* Before the first list. */
static inline void list_prepare(List *list, const Call *call) {
    if (list->named) memset(list->named, 0, (size_t)(key_blocks(call) + 63) / 64 * 8);
}

static inline int64_t rows_of_level(const Call *call, int64_t level) {
    if (level > 1 && call->replicate) return key_blocks(call) * call->block_k / level;
    return (call->keys + level - 1) / level;
}

/* Tokens that some query of block `number` may see: [from, until]. */
static inline void reach_of(const Call *call, int64_t number, int64_t *from, int64_t *until) {
    const int64_t offset = call->keys - call->queries, begin = number * call->block_q;
    const int64_t end = smaller(begin + call->block_q, call->queries) - 1;
    *from = call->left < 0 ? 0 : larger(begin + offset - call->left, 0);
    *until = call->right < 0 ? UNBOUNDED : end + offset + call->right;
}

/* Adds the rows of one block of keys at one level, as far as they lie inside [from, until]. */
static inline void add_block(
    List *list, const Call *call, int64_t block, int64_t level, int64_t from, int64_t until
) {
    int64_t start = 0; /* of the rows of this level */
    for (int64_t finer = 1; finer < level && !call->pools; finer *= 2)
        if (call->block_k % finer == 0) start += rows_of_level(call, finer);
    const int64_t per_block = call->block_k / level;
    int64_t row = block * per_block, end = smaller(row + per_block, rows_of_level(call, level));
    if (row * level < from) row = (from + level - 1) / level;
    const int64_t most = level > 1 && call->replicate ? INT64_MAX : call->keys - 1;
    const int64_t step = call->pools ? level : 1;
    list->coarse |= level > 1;
    for (; row < end; row++) {
        const int64_t last = smaller(row * level + level - 1, most);
        if (last > until) break;
        list->row[list->count] = (int32_t)(start + row * step);
        list->first[list->count] = (int32_t)(row * level);
        list->last[list->count++] = (int32_t)last;
    }
}

/* Makes list `number` of a head of the plan; returns 0 if the plan has a value it may not have. */
static inline int make_list(List *list, const Call *call, int64_t plan, int64_t number) {
    const int64_t place = plan * call->lists + number, blocks = key_blocks(call);
    int64_t from, until;
    int fits = 1;
    list->count = 0;
    list->coarse = 0;
    list->mask = 0;
    if (call->kind == BOXES) {
        for (int64_t n = call->offsets[number]; n < call->offsets[number + 1]; n++)
            for (int32_t j = 0; j < call->length[n]; j++) {
                list->row[list->count] = call->start[n] + j;
                list->first[list->count] = list->last[list->count] = 0;
                list->count++;
            }
        if (call->mask_at[number] >= 0) list->mask = call->masks + call->mask_at[number];
        return 1;
    }
    reach_of(call, number, &from, &until);
    if (call->kind == LEVELS) {
        const int8_t *levels = (const int8_t *)call->plan + place * call->width;
        for (int64_t j = 0; j < blocks; j++) {
            const int64_t level = levels[j];
            if (level == 0) continue;
            if ((level != 1 && level != 2 && level != 4 && level != 8) || call->block_k % level)
                fits = 0;
            else if (j * call->block_k <= until && (j + 1) * call->block_k > from)
                add_block(list, call, j, level, from, until);
        }
        return fits;
    }
    const int32_t *chosen = (const int32_t *)call->plan + place * call->width;
    for (int64_t n = 0; n < call->width; n++) {
        if (chosen[n] < -1 || chosen[n] >= blocks) fits = 0;
        else if (chosen[n] >= 0) list->named[chosen[n] / 64] |= (uint64_t)1 << (chosen[n] % 64);
    }
    for (int64_t word = 0; word < (blocks + 63) / 64; word++) {
        for (uint64_t bits = list->named[word]; bits; bits &= bits - 1) {
            const int64_t block = 64 * word + __builtin_ctzll(bits);
            if (block * call->block_k <= until && (block + 1) * call->block_k > from)
                add_block(list, call, block, 1, from, until);
        }
        list->named[word] = 0;
    }
    return fits;
}

#endif
