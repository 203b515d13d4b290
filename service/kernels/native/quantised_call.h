/* How a product of quantised weights is cut: rows are quantised one by one, then strips of outputs are shared among threads in pieces. */
#ifndef DEEPSEEK_QUANTISED_CALL_H
#define DEEPSEEK_QUANTISED_CALL_H

#include "native.h"

/* Bytes that quantised rows of this weight's inputs take. */
size_t quantised_bytes(const struct weights *weights, int64_t rows);

/* The product of `rows` rows that are to be quantised into `memory` (quantised_bytes, aligned to 64), into out [rows, outputs]. */
struct product start_product(const struct weights *weights, int64_t rows, char *memory, float *out);

/* The same of gates and what they gate: out [rows, outputs / 2] is their SwiGLU where `gated` says so, else both. */
struct product start_gated_product(const struct weights *weights, int64_t rows, char *memory, float *out);

/* x [inputs] becomes row `row` of the product. */
void quantise_into(const struct product *product, const struct weights *weights, const float *x, int64_t row);

/* Pieces that `threads` threads share a product in; what piece `index` of `count` begins with, nothing where there is no such piece; and the
 * piece itself, while `after` is fetched. */
int64_t product_pieces(const struct product *product, int threads);
struct upcoming piece_beginning(const struct product *product, int64_t index, int64_t count);
void multiply_piece(const struct product *product, int64_t index, int64_t count, struct upcoming after);

#endif
