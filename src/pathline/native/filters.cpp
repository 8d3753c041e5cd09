// Filters of small periodic images by the discrete Fourier transform, channels in SIMD lanes.
//
// Sums in place of a fast transform: with sines and cosines of half the frequencies each, which is
// all that images of some tens of pixels need. Compiled once for each instruction set; as in
// kernel.cpp, no header with inline functions may be included here.

#include "filters.hpp"
#include "vectors.hpp"

namespace pathline {
namespace PATHLINE_ISA {
namespace {

// P = C p and Q = S q with matrices (k, k) of cosines and sines: R rows from the one given
template <class V, int R, class T>
inline void turn_rows(int k, const T *C, const T *S, const V *p, const V *q, V *P, V *Q) {
    V even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = V{};
    for (int j = 0; j < k; ++j) {
        const V a = p[j], b = q[j];
        for (int r = 0; r < R; ++r) {
            even[r] += C[r * k + j] * a;
            odd[r] += S[r * k + j] * b;
        }
    }
    for (int r = 0; r < R; ++r) P[r] = even[r], Q[r] = odd[r];
}

template <class V, class T>
inline void turn(int k, const T *C, const T *S, const V *p, const V *q, V *P, V *Q) {
    int i = 0;
    for (; i + 4 <= k; i += 4) turn_rows<V, 4>(k, C + i * k, S + i * k, p, q, P + i, Q + i);
    for (; i < k; ++i) turn_rows<V, 1>(k, C + i * k, S + i * k, p, q, P + i, Q + i);
}

// j and n - j have one cosine and opposite sines; what is its own partner has no sine.
inline bool alone(int j, int n) { return j == 0 || 2 * j == n; }

// Some channels of an image. A spectrum is V[height][waves][2], of real and imaginary parts.
template <class T, int L>
struct Channels {
    using V = typename Some<T, L>::V;
    const FilterTask<T> &task;
    const int height, width, rows, waves;  // rows = height / 2 + 1, waves = width / 2 + 1
    V *p, *q, *P, *Q, *spectrum, *other;

    Channels(const FilterTask<T> &task, void *memory)
        : task(task),
          height(int(task.height)),
          width(int(task.width)),
          rows(height / 2 + 1),
          waves(width / 2 + 1) {
        const int most = 2 * (rows > waves ? rows : waves);
        p = static_cast<V *>(memory), q = p + most, P = q + most, Q = P + most;
        spectrum = Q + most, other = spectrum + 2 * height * waves;
    }

    static std::size_t numbers(const FilterTask<T> &task) {
        const std::ptrdiff_t rows = task.height / 2 + 1, waves = task.width / 2 + 1;
        return 8 * (rows > waves ? rows : waves) + 4 * task.height * waves;
    }

    // Along the columns of a spectrum, in place; and back, where each wave has the other's place.
    void columns(V *s, bool back) const {
        const int step = 2 * waves;
        for (int wave = 0; wave < waves; ++wave) {
            for (int part = 0; part < 2; ++part) {
                V *even = p + part * rows, *odd = q + (1 - part) * rows;
                for (int j = 0; j < rows; ++j) {
                    const V a = s[j * step + 2 * wave + part];
                    if (alone(j, height)) {
                        even[j] = a, odd[j] = V{};
                    } else {
                        const V b = s[(height - j) * step + 2 * wave + part];
                        even[j] = a + b, odd[j] = a - b;
                    }
                }
            }
            for (int part = 0; part < 2; ++part)
                turn(rows, task.cos_height, task.sin_height, p + part * rows, q + part * rows,
                     P + part * rows, Q + part * rows);
            for (int j = 0; j < rows; ++j) {
                const V re = P[j], im = P[rows + j], from_im = Q[j], from_re = Q[rows + j];
                const int other = j == 0 ? 0 : height - j;
                V *plus = s + (back ? other : j) * step + 2 * wave;
                V *minus = s + (back ? j : other) * step + 2 * wave;
                plus[0] = re + from_im, plus[1] = im - from_re;
                if (!alone(j, height)) minus[0] = re - from_im, minus[1] = im + from_re;
            }
        }
    }

    void transform(const T *x, V *s) const {
        for (int h = 0; h < height; ++h) {
            const T *row = x + h * width * task.channels;
            for (int j = 0; j < waves; ++j) {
                const V a = load<V>(row + j * task.channels);
                if (alone(j, width)) {
                    p[j] = a, q[j] = V{};
                } else {
                    const V b = load<V>(row + (width - j) * task.channels);
                    p[j] = a + b, q[j] = a - b;
                }
            }
            turn(waves, task.cos_width, task.sin_width, p, q, P, Q);
            for (int j = 0; j < waves; ++j) {
                s[2 * (h * waves + j)] = P[j];
                s[2 * (h * waves + j) + 1] = -Q[j];
            }
        }
        columns(s, false);
    }

    void back(V *s, T *y) const {
        columns(s, true);
        for (int h = 0; h < height; ++h) {
            T *row = y + h * width * task.channels;
            for (int j = 0; j < waves; ++j) {
                const T times = alone(j, width) ? T(1) : T(2);  // waves come in conjugate pairs
                p[j] = times * s[2 * (h * waves + j)];
                q[j] = times * s[2 * (h * waves + j) + 1];
            }
            turn(waves, task.cos_width, task.sin_width, p, q, P, Q);
            for (int j = 0; j < waves; ++j) {
                store<V>(P[j] - Q[j], row + j * task.channels);
                if (!alone(j, width)) store<V>(P[j] + Q[j], row + (width - j) * task.channels);
            }
        }
    }

    // Channels c to c + L of all images
    void run(Index c) const {
        const Index size = task.height * task.width * task.channels, n = height * waves;
        for (Index image = 0; image < task.images; ++image) {
            transform(task.x + image * size + c, spectrum);
            if (task.products) {
                transform(task.with + image * size + c, other);
                for (Index i = 0; i < n; ++i) {
                    T *to = task.products + i * task.channels + c;
                    V sum = spectrum[2 * i] * other[2 * i];
                    sum += spectrum[2 * i + 1] * other[2 * i + 1];
                    store<V>(image ? load<V>(to) + sum : sum, to);
                }
            }
            for (Index i = 0; i < n; ++i) {
                const V factor = load<V>(task.factors + i * task.channels + c);
                spectrum[2 * i] *= factor;
                spectrum[2 * i + 1] *= factor;
            }
            back(spectrum, task.y + image * size + c);
        }
    }
};

// Channels c to last: as many at once as there are lanes, then halves of halves
template <class T, int L = width_of<T>>
void run(const FilterTask<T> &task, Index c, Index last, void *memory) {
    const Channels<T, L> channels(task, memory);
    for (; c + L <= last; c += L) channels.run(c);
    if constexpr (L > 1)
        if (c < last) run<T, L / 2>(task, c, last, memory);
}

template <class T>
std::size_t workspace(const FilterTask<T> &task) {
    return Channels<T, 1>::numbers(task) * PATHLINE_BYTES;
}

template <class T>
void run_all(const FilterTask<T> &task, Index first, Index last, void *memory) {
    run<T>(task, first, last, memory);
}

}  // namespace

extern const Filter<float> filter_single{width_of<float>, workspace<float>, run_all<float>};
extern const Filter<double> filter_twofold{width_of<double>, workspace<double>, run_all<double>};

}  // namespace PATHLINE_ISA
}  // namespace pathline
