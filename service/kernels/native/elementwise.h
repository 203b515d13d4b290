/* Norms and activations over rows, one pass each; computed in float32 whatever the type in memory. */
#ifndef DEEPSEEK_ELEMENTWISE_H
#define DEEPSEEK_ELEMENTWISE_H

#include "quantised.h"
#include "quantised_short.h"
#include "vector.h"

INLINE void add_rms_norm_rows(enum element type, const void *x, const void *residual, const void *weight, float eps, void *out,
                              void *total, int64_t begin, int64_t end, int64_t size) {
    int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    for (int64_t row = begin; row < end; row++) {
        int64_t at = row * size;
        /* The norm is that of the stored sum, so that it does not depend on who adds. */
        vfloat squares = splat(0.0f);
        const void *summed = residual ? total : x;
        for (int64_t i = 0; i < whole; i += WIDTH) {
            vfloat v = load(type, x, at + i);
            if (residual) {
                store(type, total, at + i, v + load(type, residual, at + i));
                v = load(type, total, at + i);
            }
            squares += v * v;
        }
        if (rest) {
            vfloat v = load_some(type, x, at + whole, rest);
            if (residual) {
                store_some(type, total, at + whole, v + load_some(type, residual, at + whole, rest), rest);
                v = load_some(type, total, at + whole, rest);
            }
            squares += v * v;
        }
        vfloat inverse = splat(1.0f / sqrtf(sum_lanes(squares) / (float)size + eps));
        for (int64_t i = 0; i < whole; i += WIDTH) store(type, out, at + i, load(type, summed, at + i) * inverse * load(type, weight, i));
        if (rest)
            store_some(type, out, at + whole, load_some(type, summed, at + whole, rest) * inverse * load_some(type, weight, whole, rest),
                       rest);
    }
}

static void add_rms_norm(enum element type, const void *x, const void *residual, const void *weight, float eps, void *out, void *total,
                         int64_t begin, int64_t end, int64_t size) {
    if (type == FLOAT32) add_rms_norm_rows(FLOAT32, x, residual, weight, eps, out, total, begin, end, size);
    if (type == BFLOAT16) add_rms_norm_rows(BFLOAT16, x, residual, weight, eps, out, total, begin, end, size);
    if (type == FLOAT16) add_rms_norm_rows(FLOAT16, x, residual, weight, eps, out, total, begin, end, size);
}

INLINE vfloat silu_times(vfloat gate, vfloat up) { return gate / (splat(1.0f) + vexp2(gate * splat(-LOG2_E))) * up; }

INLINE void swiglu_rows(enum element type, const void *gate_up, void *out, int64_t begin, int64_t end, int64_t size) {
    int64_t whole = size / WIDTH * WIDTH, rest = size - whole;
    for (int64_t row = begin; row < end; row++) {
        int64_t gate = row * 2 * size, up = gate + size, at = row * size;
        for (int64_t i = 0; i < whole; i += WIDTH)
            store(type, out, at + i, silu_times(load(type, gate_up, gate + i), load(type, gate_up, up + i)));
        if (rest)
            store_some(type, out, at + whole,
                       silu_times(load_some(type, gate_up, gate + whole, rest), load_some(type, gate_up, up + whole, rest)), rest);
    }
}

static void swiglu(enum element type, const void *gate_up, void *out, int64_t begin, int64_t end, int64_t size) {
    if (type == FLOAT32) swiglu_rows(FLOAT32, gate_up, out, begin, end, size);
    if (type == BFLOAT16) swiglu_rows(BFLOAT16, gate_up, out, begin, end, size);
    if (type == FLOAT16) swiglu_rows(FLOAT16, gate_up, out, begin, end, size);
}

INLINE void rotate_rows(enum element type, const void *x, int64_t row_stride, int64_t head_stride, const float *cos, const float *sin,
                        void *out, int64_t begin, int64_t end, int64_t heads, int64_t size, int64_t half) {
    for (int64_t row = begin; row < end; row++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t from = row * row_stride + head * head_stride, to = (row * heads + head) * size;
            for (int64_t i = 0; i < half; i += WIDTH) {
                int64_t count = half - i < WIDTH ? half - i : WIDTH;
                vfloat first = load_some(type, x, from + i, count), second = load_some(type, x, from + half + i, count);
                vfloat c = load_some(FLOAT32, cos, row * half + i, count), s = load_some(FLOAT32, sin, row * half + i, count);
                store_some(type, out, to + i, first * c - second * s, count);
                store_some(type, out, to + half + i, second * c + first * s, count);
            }
            const size_t bytes = type == FLOAT32 ? 4 : 2;
            const char *rest = (const char *)x + (from + 2 * half) * bytes;
            char *to_rest = (char *)out + (to + 2 * half) * bytes;
            if (rest != to_rest) memcpy(to_rest, rest, (size - 2 * half) * bytes);
        }
}

static void rotate(enum element type, const void *x, int64_t row_stride, int64_t head_stride, const float *cos, const float *sin, void *out,
                   int64_t begin, int64_t end, int64_t heads, int64_t size, int64_t half) {
    if (type == FLOAT32) rotate_rows(FLOAT32, x, row_stride, head_stride, cos, sin, out, begin, end, heads, size, half);
    if (type == BFLOAT16) rotate_rows(BFLOAT16, x, row_stride, head_stride, cos, sin, out, begin, end, heads, size, half);
    if (type == FLOAT16) rotate_rows(FLOAT16, x, row_stride, head_stride, cos, sin, out, begin, end, heads, size, half);
}

INLINE void head_gate_rows(enum element type, const void *x, int64_t row_stride, int64_t head_stride, const void *logits, void *out,
                           int64_t begin, int64_t end, int64_t heads, int64_t size) {
    for (int64_t row = begin; row < end; row++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t from = row * row_stride + head * head_stride, at = row * heads + head, to = at * size;
            vfloat logit = splat(load_some(type, logits, at, 1)[0]);
            vfloat gate = splat(1.0f) / (splat(1.0f) + vexp2(logit * splat(-LOG2_E)));
            for (int64_t i = 0; i < size; i += WIDTH) {
                int64_t count = size - i < WIDTH ? size - i : WIDTH;
                store_some(type, out, to + i, load_some(type, x, from + i, count) * gate, count);
            }
        }
}

static void head_gate(enum element type, const void *x, int64_t row_stride, int64_t head_stride, const void *logits, void *out,
                      int64_t begin, int64_t end, int64_t heads, int64_t size) {
    if (type == FLOAT32) head_gate_rows(FLOAT32, x, row_stride, head_stride, logits, out, begin, end, heads, size);
    if (type == BFLOAT16) head_gate_rows(BFLOAT16, x, row_stride, head_stride, logits, out, begin, end, heads, size);
    if (type == FLOAT16) head_gate_rows(FLOAT16, x, row_stride, head_stride, logits, out, begin, end, heads, size);
}

INLINE void narrow_to(enum element type, const float *x, void *out, int64_t count) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        int64_t some = count - i < WIDTH ? count - i : WIDTH;
        store_some(type, out, i, load_some(FLOAT32, x, i, some), some);
    }
}

#if HAS_DOTS
/* x [count] as steps of -127 .. 127 of its largest magnitude, and behind them what a step is; what is not finite makes that not finite. */
static void narrow_to_steps(const float *x, int8_t *out, int64_t count) {
    int32_t sum;
    float scale = quantise_row(x, count, count, count, out, 64, &sum);
    memcpy(out + count, &scale, sizeof scale);
}
#endif

static void narrow(enum element type, const float *x, void *out, int64_t count) {
#if HAS_DOTS
    if (type == STORED_INT8) narrow_to_steps(x, out, count);
#endif
    if (type == FLOAT32) memcpy(out, x, count * sizeof *x);
    if (type == BFLOAT16) narrow_to(BFLOAT16, x, out, count);
    if (type == FLOAT16) narrow_to(FLOAT16, x, out, count);
}

#endif
