/* Scores to weights under a running maximum: what products of 8, 16 and 32 bits have in common.
 *
 * Rows that share a block go through each stage together: the chains of one row are long, and another row's fill the gaps. Invariant: what
 * is computed for a row is a chain of operations that depends on the row alone.
 */
#ifndef DEEPSEEK_WEIGHING_H
#define DEEPSEEK_WEIGHING_H

#include "panels.h"

/* tanh by its series near 0 and by 2^x elsewhere. */
INLINE vfloat vtanh(vfloat x) {
    vfloat square = x * x;
    vfloat near = x + x * square * (splat(-1.0f / 3) + square * (splat(2.0f / 15) + square * (splat(-17.0f / 315) + square * splat(62.0f / 2835))));
    vfloat far = splat(1.0f) - splat(2.0f) / (splat(1.0f) + vexp2(x * splat(2 * LOG2_E)));
    return pick(square < splat(0.09f), near, far);
}

/* What weighing rows needs of a block: scales of its tokens, or NULL, the cap on scores, and what scores have yet to be multiplied by. */
struct weighing {
    const float *key_scales, *value_scales;
    float softcap, unit;
};

/* What scores that `highest_score` has been over have yet to be multiplied by: a cap is applied in its own units. */
INLINE float unit_left(const struct weighing *w) { return w->softcap > 0 ? 1.0f : w->unit; }

#if defined(ISA_AVX512)
INLINE __mmask16 lanes_between(int64_t low, int64_t high, int64_t column) {
    int64_t first = low - column < 0 ? 0 : low - column < 16 ? low - column : 16, last = high - column < 0 ? 0 : high - column < 16 ? high - column : 16;
    return last > first ? (__mmask16)(((1u << last) - 1) & ~((1u << first) - 1)) : 0;
}

/* 2^x for a number that is rounded to 8 bits: to within 3 millionths; 0 for -infinity. */
static const float EXP2_SHORT[] = {0x1.3997d6p-7f, 0x1.ca1440p-5f, 0x1.ec06dap-3f, 0x1.62e0dcp-1f, 0x1.ffffe8p-1f};
INLINE __m512 exp2_short(__m512 x) { return exp2_by(x, EXP2_SHORT, 5); }

/* The new maximum of a row, whose scores become what is weighed, but for unit_left: scaled, capped, and -infinity outside of low .. high - 1. */
INLINE float highest_score(const int64_t columns, const struct weighing *w, float *scores, int64_t low, int64_t high, float before) {
    __m512 highest = _mm512_set1_ps(-INFINITY);
    const int masked = low > 0 || high < columns, changed = masked || w->softcap > 0 || w->key_scales;
#pragma GCC unroll 4
    for (int64_t i = 0; i < columns; i += 16) {
        __m512 s = _mm512_loadu_ps(scores + i);
        if (changed) {
            if (w->key_scales) s = _mm512_mul_ps(s, _mm512_loadu_ps(w->key_scales + i));
            if (w->softcap > 0) s = (__m512)(splat(w->softcap * LOG2_E) * vtanh((vfloat)s * splat(w->unit / w->softcap)));
            if (masked) s = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), lanes_between(low, high, i), s);
            _mm512_storeu_ps(scores + i, s);
        }
        highest = _mm512_max_ps(s, highest); /* the second where one is not a number */
    }
    float now = _mm512_reduce_max_ps(highest) * unit_left(w);
    return now > before ? now : before;
}

/* The new maxima of rows that share a block, and the factors for what was summed under the old ones. */
INLINE void highest_scores(const int64_t columns, int rows, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                           float *maxima, float *factors) {
    float shrink[16] = {0};
    for (int r = 0; r < rows; r++) {
        if (low[r] >= high[r]) continue;
        float now = highest_score(columns, w, scores + r * columns, low[r], high[r], maxima[r]);
        shrink[r] = maxima[r] - now;
        maxima[r] = now;
    }
    _mm512_storeu_ps(shrink, exp2_lanes(_mm512_loadu_ps(shrink)));
    memcpy(factors, shrink, rows * sizeof *factors);
}

INLINE void add_total(float *sums, float factor, __m512 total) {
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(factor), total));
}
#endif

/* Rows of one block, row r of which sees the columns low[r] .. high[r] - 1: scores become unnormalised weights, times the scales of the values
 * and 0 where a row sees nothing, in their place. Updates maxima and lane sums [rows, WIDTH], which know no scales, and gives the factors for
 * what was mixed under the old maxima. */
#if defined(ISA_AVX512)
INLINE void weigh_rows_of(const int64_t columns, int rows, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                          float *maxima, float *sums, float *factors) {
    highest_scores(columns, rows, w, scores, low, high, maxima, factors);
    for (int r = 0; r < rows; r++) {
        float *row = scores + r * columns;
        if (low[r] >= high[r]) {
            memset(row, 0, columns * sizeof *row);
            continue;
        }
        const __m512 top = _mm512_set1_ps(maxima[r]);
        __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int64_t i = 0; i < columns; i += WIDTH) {
            __m512 weight = exp2_lanes(_mm512_sub_ps(_mm512_loadu_ps(row + i), top));
            total = _mm512_add_ps(total, weight);
            _mm512_storeu_ps(row + i, w->value_scales ? _mm512_mul_ps(weight, _mm512_loadu_ps(w->value_scales + i)) : weight);
        }
        add_total(sums + r * WIDTH, factors[r], total);
    }
}

static void weigh_rows(int rows, int64_t columns, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                       float *maxima, float *sums, float *factors) {
    if (columns == 64)
        weigh_rows_of(64, rows, w, scores, low, high, maxima, sums, factors);
    else
        weigh_rows_of(columns, rows, w, scores, low, high, maxima, sums, factors);
}
#else
INLINE float weigh_row(float *scores, int64_t columns, int64_t low, int64_t high, const struct weighing *w, float *maximum,
                       float *sums) {
    vfloat highest = splat(*maximum);
    vint lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    int masked = low > 0 || high < columns;
    for (int64_t i = 0; i < columns; i += WIDTH) {
        vfloat s = load_float(scores + i);
        if (w->key_scales) s *= load_float(w->key_scales + i);
        if (w->softcap > 0) s = splat(w->softcap * LOG2_E) * vtanh(s * splat(1.0f / w->softcap));
        if (masked) {
            vint at = lane + (int32_t)i;
            s = pick((at >= (int32_t)low) & (at < (int32_t)high), s, splat(-INFINITY));
        }
        highest = vmaximum(s, highest);
        store_float(scores + i, s);
    }
    float before = *maximum, now = maximum_of_lanes(highest);
    vfloat top = splat(now), total = splat(0.0f);
    float factor = vexp2(splat(before - now))[0];
    for (int64_t i = 0; i < columns; i += WIDTH) {
        vfloat weight = vexp2(load_float(scores + i) - top);
        total += weight;
        store_float(scores + i, w->value_scales ? weight * load_float(w->value_scales + i) : weight);
    }
    store_float(sums, load_float(sums) * splat(factor) + total);
    *maximum = now;
    return factor;
}

static void weigh_rows(int rows, int64_t columns, const struct weighing *w, float *scores, const int64_t *low, const int64_t *high,
                       float *maxima, float *sums, float *factors) {
    for (int r = 0; r < rows; r++) {
        float *row = scores + r * columns;
        factors[r] = 1.0f;
        if (low[r] < high[r])
            factors[r] = weigh_row(row, columns, low[r], high[r], w, maxima + r, sums + r * WIDTH);
        else
            memset(row, 0, columns * sizeof *row);
    }
}
#endif

#endif
