// Vector registers of an instruction set: each of its sources has them to itself.
#pragma once

#include <cstddef>

#if defined(PATHLINE_BYTES)  // of a vector register
#elif defined(__AVX512F__)
#define PATHLINE_BYTES 64
#elif defined(__AVX__)
#define PATHLINE_BYTES 32
#else
#define PATHLINE_BYTES 16
#endif

#if !defined(__GNUC__)
#error "the kernel needs the vector types of GCC or Clang"
#endif

namespace pathline {
namespace PATHLINE_ISA {
namespace {

using Index = std::ptrdiff_t;

template <class T>
using Vec __attribute__((vector_size(PATHLINE_BYTES))) = T;

template <class T>
constexpr int width_of = PATHLINE_BYTES / sizeof(T);

template <class T>
inline Vec<T> all(T value) {
    return value - Vec<T>{};
}

// V is a vector of L numbers.
template <class T, int L>
struct Some {
    using V __attribute__((vector_size(L * sizeof(T)))) = T;
};
template <class T>
struct Some<T, 1> {
    using V = T;
};

template <class V, class T>
inline V load(const T *from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(V));
    return value;
}

template <class V, class T>
inline void store(const V &value, T *to) {
    __builtin_memcpy(to, &value, sizeof(V));
}

}  // namespace
}  // namespace PATHLINE_ISA
}  // namespace pathline
