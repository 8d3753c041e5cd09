// What module.cpp asks of the norms of channels, which are compiled once for each instruction set.
#pragma once

#include <cstddef>

namespace pathline {

// y = scale z / sqrt(sum z^2 + small) + bias for rows of channels, and its maximum with 0 where
// `relu`. Arrays are row-major.
template <class T>
struct NormTask {
    std::ptrdiff_t rows, channels;
    T small;
    bool relu;
    const T *z, *scale, *bias;  // (rows, channels), (channels), (channels)
    T *y;                       // (rows, channels)

    // Or the derivatives of a loss in z, scale and bias, from those in y.
    const T *d_y;  // (rows, channels)
    T *d_z;        // (rows, channels)
};

// The norm for one instruction set. Rows are independent, but for the sums that are the derivatives
// in scale and bias: `backward` adds those of its rows to `sums`, (2, channels).
template <class T>
struct Norm {
    void (*forward)(const NormTask<T> &, std::ptrdiff_t first, std::ptrdiff_t last);
    void (*backward)(const NormTask<T> &, std::ptrdiff_t first, std::ptrdiff_t last, T *sums);
};

#define PATHLINE_DECLARE(isa)                 \
    namespace isa {                           \
    extern const Norm<float> norm_single;     \
    extern const Norm<double> norm_twofold;   \
    }
PATHLINE_DECLARE(baseline)
PATHLINE_DECLARE(avx2)
PATHLINE_DECLARE(avx512)
#undef PATHLINE_DECLARE

}  // namespace pathline
