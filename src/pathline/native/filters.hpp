// What module.cpp asks of the filters of images, which are compiled once for each instruction set.
#pragma once

#include <cstddef>

namespace pathline {

// y = F^-1 f F x for periodic images with channels last: F is the real Fourier transform of an image
// and f real, so that the filter is symmetric. Arrays are row-major.
template <class T>
struct FilterTask {
    std::ptrdiff_t images, height, width, channels;
    const T *x;        // (images, height, width, channels)
    const T *factors;  // f / (height width), (height, width / 2 + 1, channels)
    T *y;              // like x

    // Also, where wanted, the sum over images of <F x, F d_y> at each wave: (height, width / 2 + 1,
    // channels), of another array like x.
    const T *with;
    T *products;

    // cos and sin of 2 pi j k / n for j and k from 0 to n / 2, where n is height or width
    const T *cos_height, *sin_height, *cos_width, *sin_width;
};

// The filter for one instruction set. Channels are independent, and worked on by `lanes` at a time.
template <class T>
struct Filter {
    int lanes;
    std::size_t (*workspace)(const FilterTask<T> &);  // bytes, aligned to 64
    void (*run)(const FilterTask<T> &, std::ptrdiff_t first, std::ptrdiff_t last, void *workspace);
};

#define PATHLINE_DECLARE(isa)                     \
    namespace isa {                               \
    extern const Filter<float> filter_single;     \
    extern const Filter<double> filter_twofold;   \
    }
PATHLINE_DECLARE(baseline)
PATHLINE_DECLARE(avx2)
PATHLINE_DECLARE(avx512)
#undef PATHLINE_DECLARE

}  // namespace pathline
