// What module.cpp asks of the kernels, which are compiled once for each instruction set.
#pragma once

#include <cstddef>

namespace pathline {

// One rollout of a potential under optimal transport: dz/dt = -grad Phi(z, t), by equal steps of
// classical RK4, with Simpson's rule on z_n, the Hermite midpoint and z_{n+1} for the integrals of
// |grad Phi|^2 / 2 (cost), -lap Phi (log_det) and |d_t Phi - |grad Phi|^2 / 2| (hjb).
//
// Arrays are row-major. `theta` is w (width), A (rank, inputs), b (inputs), then K_i and b_i of each
// layer, with inputs = dim + 1 + context_dim in the order (x, t, context). Null: not wanted, or zero.
template <class T>
struct Task {
    int dim, context_dim, width, depth, rank, steps;
    double start, stop;
    bool integrals;
    std::ptrdiff_t batch;
    const T *theta, *x, *context;

    // The residual layers' part of the Laplacian is a sum over the columns of K_0 E, E E^T = I:
    // E is the identity, `frame` (dim, columns), or for each sample its signs `probe` (batch, dim),
    // which make that part unbiased. Null: none of them.
    int columns;
    const T *frame, *probe;

    T *z;                       // (batch, dim), at time stop
    T *cost, *log_det, *hjb;    // (batch,)

    // The derivatives of a loss in these results; the gradient is computed where one is given.
    bool gradient;
    const T *d_z;                              // (batch, dim)
    const T *a_terminal;                       // (batch,): beside d_z, a_terminal z
    const T *d_cost, *d_log_det, *d_hjb;       // (batch,)
    T *d_x, *d_context;                        // (batch, dim), (batch, context_dim)
    T *d_theta;                                // like theta; the tiles of a call are added to it

    int inputs() const { return dim + 1 + context_dim; }
    std::ptrdiff_t parameters() const {
        std::ptrdiff_t m = width, n = inputs();
        return m + (rank + 1) * n + m * (n + 1) + (depth - 1) * m * (m + 1);
    }
};

// A kernel for one instruction set. Samples are worked on in tiles; a range of tiles is one
// thread's share, with a workspace of its own.
template <class T>
struct Kernel {
    int tile;                                      // samples
    std::size_t (*workspace)(const Task<T> &);     // bytes, aligned to 64
    void (*run)(const Task<T> &, std::ptrdiff_t first, std::ptrdiff_t last, void *workspace);
};

#define PATHLINE_DECLARE(isa)              \
    namespace isa {                        \
    extern const Kernel<float> single;     \
    extern const Kernel<double> twofold;   \
    }
PATHLINE_DECLARE(baseline)
PATHLINE_DECLARE(avx2)
PATHLINE_DECLARE(avx512)
#undef PATHLINE_DECLARE

}  // namespace pathline
