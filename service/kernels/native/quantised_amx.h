/* Products of int8 activations with int8 weights by AMX: 16 rows times 16 outputs times 64 inputs an instruction.
 *
 * A strip of quantised.h is a column of AMX tiles as it lies: 16 words of four inputs times 16 outputs, 1 KB after the other. Rows lie in
 * tiles too, 64 inputs of 16 rows after the other; a last tile may have fewer, whatever stands in the others is not written. What was
 * summed is scaled and written while the next tiles are multiplied. Invariant: the integer sums are exact and what becomes of them is that
 * of quantised.h, so the bits are those of VNNI.
 */
#ifndef DEEPSEEK_QUANTISED_AMX_H
#define DEEPSEEK_QUANTISED_AMX_H

#include "amx.h"
#include "elementwise.h"

#if defined(ISA_AMX)
/* Bytes of activations that stay in the second level cache while the strips of a piece pass by. */
#define KEPT_BYTES (768 << 10)

/* Sums of four tiles: of rows from `row` on, the second sixteen behind the first, times strips from `strip` on. Rows `next` .. rows - 1 of
 * them are to be written. */
struct patch {
    _Alignas(64) int32_t sums[4][MATRIX_HEIGHT][16];
    int64_t row, strip, next, rows;
};

/* 16 outputs of a row that there are, from their sums. */
INLINE __m512 whole_values(const struct product *p, const int32_t *sums, __m512i offset, __m512 row_scale, int64_t output) {
    return int8_values(_mm512_load_si512(sums), offset, row_scale, p, output, 0xffff);
}

/* Write some of what was summed over `across` strips, of outputs that there are; of a gated product half of them are gates of the others. */
INLINE void put_rows(const struct product *p, const int across, const int gated, struct patch *patch, int64_t count) {
    const int64_t end = at_most(patch->next + count, patch->rows), output = 16 * patch->strip;
    const int wide = gated ? across / 2 : across, whole = output + 16 * wide <= p->outputs;
    for (int64_t r = patch->next; r < end; r++) {
        const int64_t row = patch->row + r;
        const __m512i offset = _mm512_set1_epi32(128 * p->x_sums[row]);
        const __m512 row_scale = _mm512_set1_ps(p->x_scales[row]);
        const int32_t *sums = patch->sums[r / MATRIX_HEIGHT * across][r % MATRIX_HEIGHT];
        float *out = p->out + row * p->outputs + output;
#pragma GCC unroll 4
        for (int i = 0; i < wide; i++, sums += 16 * MATRIX_HEIGHT) {
            if (gated && (whole || i == 0)) {
                const __m512 gate = whole_values(p, sums, offset, row_scale, output + 16 * i);
                const __m512 up = whole_values(p, sums + wide * 16 * MATRIX_HEIGHT, offset, row_scale, p->outputs + output + 16 * i);
                _mm512_storeu_ps(out + 16 * i, (__m512)silu_times((vfloat)gate, (vfloat)up));
            } else if (whole) {
                _mm512_storeu_ps(out + 16 * i, whole_values(p, sums, offset, row_scale, output + 16 * i));
            } else if (!gated) {
                put_int8(_mm512_load_si512(sums), offset, row_scale, p, row, output + 16 * i);
            }
        }
    }
    patch->next = end;
}

/* Two tiles of rows times two strips, or one times four, while vectors of the patch before are written. A piece ends with a whole tile of
 * strips or with the last output: what lies beyond that is the last strip once more, and is not written. The second half of a gated
 * product's strips are those that the first half gates. */
INLINE void multiply_patch(const struct product *p, const int across, const int gated, int64_t row, int64_t strip, int64_t strips,
                           struct ahead ahead, struct patch *before, struct patch *patch) {
    const int8_t *x0 = p->x + row * p->padded, *x1 = x0 + MATRIX_HEIGHT * p->padded;
    const uint8_t *w[4];
    const int wide = gated ? across / 2 : across;
    for (int i = 0; i < across; i++) w[i] = p->weight + (i / wide * p->outputs + 16 * (strip + at_most(i % wide, strips - 1))) * p->padded;
    const int64_t steps = p->padded / LINE_BYTES, share = (before->rows + steps - 1) / steps;
    ZERO_TILES
    for (int64_t i = 0; i < steps * TILE_BYTES; i += TILE_BYTES) {
        ahead = fetch(ahead);
        _tile_loadd(4, x0 + i, LINE_BYTES);
        _tile_loadd(6, w[0] + i, LINE_BYTES);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, w[1] + i, LINE_BYTES);
        _tile_dpbsud(1, 4, 7);
        if (across == 2) {
            _tile_loadd(5, x1 + i, LINE_BYTES);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        } else {
            _tile_loadd(6, w[2] + i, LINE_BYTES);
            _tile_dpbsud(2, 4, 6);
            _tile_loadd(7, w[3] + i, LINE_BYTES);
            _tile_dpbsud(3, 4, 7);
        }
        put_rows(p, across, gated, before, share);
    }
    STORE_TILES(patch->sums, LINE_BYTES)
    patch->row = row, patch->strip = strip, patch->next = 0, patch->rows = at_most(4 / across * MATRIX_HEIGHT, p->rows - row);
}

/* Patches one above the other, each `across` strips wide, of rows begin .. end - 1 and up to four strips, while the next memory is fetched. */
INLINE void multiply_column(const struct product *p, const int across, const int gated, int64_t begin, int64_t end, int64_t strip,
                            int64_t strips, struct upcoming next) {
    const int64_t wide = gated ? across / 2 : across;
    const int64_t height = 4 / across * MATRIX_HEIGHT, count = (end - begin + height - 1) / height * ((strips + wide - 1) / wide);
    const int64_t steps = p->padded / LINE_BYTES, share = next.lines > 0 ? (next.lines + steps * count - 1) / (steps * count) : 0;
    struct patch patches[2];
    int at = 0;
    patches[1].rows = 0;
    for (int64_t row = begin; row < end; row += height)
        for (int64_t done = 0; done < strips; done += wide, at = !at) {
            struct ahead ahead = {next.at, next.lines > 0 ? (int)share : 0};
            multiply_patch(p, across, gated, row, strip + done, strips - done, ahead, patches + !at, patches + at);
            next.at += 64 * steps * share, next.lines -= steps * share;
        }
    put_rows(p, across, gated, patches + !at, height);
}

static void multiply_paired(const struct product *p, int64_t begin, int64_t end, int64_t strip, int64_t strips, struct upcoming next) {
    if (p->gated)
        multiply_column(p, 2, 1, begin, end, strip, strips, next);
    else
        multiply_column(p, 2, 0, begin, end, strip, strips, next);
}

static void multiply_single(const struct product *p, int64_t begin, int64_t end, int64_t strip, int64_t strips, struct upcoming next) {
    if (p->gated)
        multiply_column(p, 4, 1, begin, end, strip, strips, next);
    else
        multiply_column(p, 4, 0, begin, end, strip, strips, next);
}

/* All rows of a product times the strips begin .. end - 1: pairs of tiles of rows, and one that is left over for itself. */
static void matrix_strips(const struct product *p, int64_t begin, int64_t end, struct upcoming after) {
    const int64_t width = tile_strips(p), pair = 2 * MATRIX_HEIGHT, kept = KEPT_BYTES / p->padded / pair * pair, chunk = kept > 0 ? kept : pair;
    const int64_t paired = (p->rows + MATRIX_HEIGHT - 1) / pair * pair;
    use_shapes();
    for (int64_t row = 0; row < p->rows; row += chunk) {
        const int64_t last = at_most(row + chunk, p->rows), middle = last < p->rows ? last : paired;
        for (int64_t strip = begin; strip < end; strip += width) {
            const int64_t strips = at_most(end - strip, width);
            struct upcoming next = {NULL, 0};
            if (strip + width >= end) next = last == p->rows ? after : next;
            else if (row == 0)
                next = (struct upcoming){(const char *)p->weight + (strip + width) * strip_bytes(p), width * strip_bytes(p) / 64};
            if (row < middle) multiply_paired(p, row, at_most(middle, p->rows), strip, strips, next);
            if (middle < last) multiply_single(p, middle, last, strip, strips, row < middle ? (struct upcoming){NULL, 0} : next);
        }
    }
    _tile_release();
}
#endif

#endif
