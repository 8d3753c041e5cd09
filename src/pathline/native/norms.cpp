// Norms of channels with the ReLU behind them, and their gradient, each in one pass over memory.
//
// Compiled once for each instruction set; as in kernel.cpp, no header with inline functions may be
// included here.

#include "norms.hpp"
#include "vectors.hpp"

namespace pathline {
namespace PATHLINE_ISA {
namespace {

constexpr int BLOCK = 16;  // rows that stay in the cache between the passes over them

// f(V{}, j) for vectors V that cover channels 0 to n: whole registers, then halves of halves.
template <class T, int L = width_of<T>, class F>
__attribute__((always_inline)) inline void each(Index n, const F &f, Index j = 0) {
    for (; j + L <= n; j += L) f(typename Some<T, L>::V{}, j);
    if constexpr (L > 1)
        if (j < n) each<T, L / 2>(n, f, j);
}

// The sum of the lanes, halves upon halves
template <class T, int L>
inline T sum(typename Some<T, L>::V x) {
    if constexpr (L == 1) {
        return x;
    } else {
        using Half = typename Some<T, L / 2>::V;
        Half halves[2];
        __builtin_memcpy(halves, &x, sizeof x);
        return sum<T, L / 2>(halves[0] + halves[1]);
    }
}

// The sum of term(V{}, j) over the channels
template <class T, class F>
__attribute__((always_inline)) inline T total(Index n, const F &term) {
    Vec<T> whole{};
    T rest = 0;
    each<T>(n, [&](auto v, Index j) {
        using V = decltype(v);
        const V x = term(v, j);
        if constexpr (sizeof(V) == sizeof(whole)) whole += x;
        else rest += sum<T, sizeof(V) / sizeof(T)>(x);
    });
    return sum<T, width_of<T>>(whole) + rest;
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// 1 / sqrt(sum z^2 + small) of each row
template <class T>
inline void inverses(const NormTask<T> &k, Index first, int rows, T *inverse) {
    for (int r = 0; r < rows; ++r) {
        const T *z = k.z + (first + r) * k.channels;
        inverse[r] = total<T>(k.channels, [&](auto v, Index j) {
            auto x = load<decltype(v)>(z + j);
            return x * x;
        });
    }
    for (int r = 0; r < rows; ++r) inverse[r] = T(1) / root(inverse[r] + k.small);
}

template <class T, bool relu>
void forward(const NormTask<T> &k, Index first, Index last) {
    const Index n = k.channels;
    for (; first < last; first += BLOCK) {
        const int rows = int(last - first < BLOCK ? last - first : BLOCK);
        T inverse[BLOCK];
        inverses(k, first, rows, inverse);
        each<T>(n, [&](auto v, Index j) {
            using V = decltype(v);
            const V scale = load<V>(k.scale + j), bias = load<V>(k.bias + j);
            for (int r = 0; r < rows; ++r) {
                const Index at = (first + r) * n + j;
                V y = load<V>(k.z + at) * inverse[r] * scale + bias;
                if (relu) y = y < T(0) ? V{} : y;  // keeps NaN
                store(y, k.y + at);
            }
        });
    }
}

// With u = z / |z|, where |z| is the root, and g = dL/dy: dL/dz = (s g - u <s g, u>) / |z|.
template <class T, bool relu>
void backward(const NormTask<T> &k, Index first, Index last, T *sums) {
    const Index n = k.channels;
    for (; first < last; first += BLOCK) {
        const int rows = int(last - first < BLOCK ? last - first : BLOCK);
        T inverse[BLOCK], along[BLOCK];
        inverses(k, first, rows, inverse);
        auto slope = [&](auto u, auto scale, auto bias, Index at) {
            using V = decltype(u);
            V g = load<V>(k.d_y + at);
            if (relu) g = u * scale + bias <= T(0) ? V{} : g;
            return g;
        };
        for (int r = 0; r < rows; ++r) {
            const Index row = (first + r) * n;
            along[r] = total<T>(n, [&](auto v, Index j) {
                using V = decltype(v);
                const V scale = load<V>(k.scale + j), u = load<V>(k.z + row + j) * inverse[r];
                return slope(u, scale, load<V>(k.bias + j), row + j) * scale * u;
            });
        }
        each<T>(n, [&](auto v, Index j) {
            using V = decltype(v);
            const V scale = load<V>(k.scale + j), bias = load<V>(k.bias + j);
            V d_scale{}, d_bias{};
            for (int r = 0; r < rows; ++r) {
                const Index at = (first + r) * n + j;
                const V u = load<V>(k.z + at) * inverse[r], g = slope(u, scale, bias, at);
                d_scale += g * u;
                d_bias += g;
                store((g * scale - u * along[r]) * inverse[r], k.d_z + at);
            }
            store(load<V>(sums + j) + d_scale, sums + j);
            store(load<V>(sums + n + j) + d_bias, sums + n + j);
        });
    }
}

template <class T>
void forward(const NormTask<T> &task, Index first, Index last) {
    task.relu ? forward<T, true>(task, first, last) : forward<T, false>(task, first, last);
}

template <class T>
void backward(const NormTask<T> &task, Index first, Index last, T *sums) {
    task.relu ? backward<T, true>(task, first, last, sums)
              : backward<T, false>(task, first, last, sums);
}

}  // namespace

extern const Norm<float> norm_single{forward<float>, backward<float>};
extern const Norm<double> norm_twofold{forward<double>, backward<double>};

}  // namespace PATHLINE_ISA
}  // namespace pathline
