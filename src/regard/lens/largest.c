/* The largest numbers of rows, for whoever has the rows: see `largest.h`. */
#include "largest.h"

/* values and places [rows][wanted] of x [rows][width]. */
REGARD_EXPORT(void, largest)
(const float *x, int64_t rows, int64_t width, int64_t wanted, float *values, int32_t *places) {
    for (int64_t row = 0; row < rows; row++)
        largest_of_row(x + row * width, width, wanted, values + row * wanted, places + row * wanted);
}
