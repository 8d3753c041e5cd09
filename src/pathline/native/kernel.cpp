// Potential flows of small networks: rollout and exact gradient, samples in SIMD lanes.
//
// Compiled once for each instruction set. No header with inline functions may be included here: the
// linker would keep one copy of them, perhaps the one that an older processor can't run.
//
// Source: Onken, Wu Fung, Li, Ruthotto, OT-Flow (arXiv 2006.00104), for Phi, its gradient and its
// Laplacian; the gradient of the rollout is the discrete adjoint of its Runge-Kutta steps.

#include "kernel.hpp"
#include "vectors.hpp"

namespace pathline {
namespace PATHLINE_ISA {
namespace {

// Vectors -------------------------------------------------------------------------------------

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
    using Bits = int;
    static constexpr Bits sign = 0x7fffffff;
    static constexpr int mantissa = 23, bias = 127, exp_terms = 7, atanh_terms = 6;
    static constexpr float magic = 12582912.0f, lowest = -80.0f;  // 1.5 * 2^23
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Lanes<double> {
    using Bits = long long;
    static constexpr Bits sign = 0x7fffffffffffffffLL;
    static constexpr int mantissa = 52, bias = 1023, exp_terms = 13, atanh_terms = 15;
    static constexpr double magic = 6755399441055744.0, lowest = -700.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
};

template <class T>
using BitsOf __attribute__((vector_size(PATHLINE_BYTES))) = typename Lanes<T>::Bits;
constexpr int NV = PATHLINE_BYTES == 64 ? 2 : 4;  // vectors of a tile: what the registers hold
constexpr int RB = PATHLINE_BYTES == 64 ? 8 : 2;  // rows of a product at once

template <class T>
inline Vec<T> absolute(Vec<T> x) {
    return (Vec<T>)((BitsOf<T>)x & Lanes<T>::sign);
}

// tanh x and, if asked for, log(2 cosh x), from e = exp(-2|x|).
template <class T, bool log_cosh>
inline void activate(Vec<T> x, Vec<T> &tanh, Vec<T> &value) {
    using N = Lanes<T>;
    Vec<T> size = absolute<T>(x), y = T(-2) * size;
    y = y < N::lowest ? all<T>(N::lowest) : y;  // keeps NaN
    Vec<T> shifted = y * T(1.44269504088896340736) + N::magic;
    Vec<T> k = shifted - N::magic;
    Vec<T> r = (y - k * N::ln2_high) - k * N::ln2_low;
    // expm1 r = r (1 + r/2 (1 + r/3 (...)))
    Vec<T> p = all<T>(1);
    for (int n = N::exp_terms; n > 1; --n) p = T(1) + r * p * T(1.0 / n);
    p = p * r;
    BitsOf<T> exponent = ((BitsOf<T>)shifted + N::bias) << N::mantissa;
    Vec<T> power = (Vec<T>)exponent;
    Vec<T> minus_one = power * p + (power - T(1));  // e - 1
    Vec<T> e = minus_one + T(1), above_one = minus_one + T(2), t;
    if (log_cosh) {  // |x| + log(1 + e) and log(1 + e) = 2 atanh q, 0 <= q <= 1/3
        Vec<T> above_two = e + T(2);
        Vec<T> inverse = T(1) / (above_one * above_two);  // one division for both
        Vec<T> q = e * above_one * inverse, q2 = q * q;
        Vec<T> series = all<T>(T(1.0 / (2 * N::atanh_terms + 1)));
        for (int n = N::atanh_terms - 1; n >= 0; --n) series = series * q2 + T(1.0 / (2 * n + 1));
        value = size + T(2) * q * series;
        t = minus_one * above_two * inverse;
    } else {
        t = minus_one / above_one;
    }
    tanh = (Vec<T>)(((BitsOf<T>)t & N::sign) | ((BitsOf<T>)x & ~N::sign));
}

// Products on a tile: an array of n features is Vec[n][NV] ---------------------------------------

template <class T, int R>
inline void product_rows(const T *M, Index ld, int columns, const Vec<T> *in, const T *bias,
                         Vec<T> *out) {
    Vec<T> sum[R][NV];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) sum[r][v] = all<T>(bias ? bias[r] : T(0));
    for (int j = 0; j < columns; ++j) {
        Vec<T> x[NV];
        for (int v = 0; v < NV; ++v) x[v] = in[j * NV + v];
        for (int r = 0; r < R; ++r) {
            Vec<T> m = all<T>(M[r * ld + j]);
            for (int v = 0; v < NV; ++v) sum[r][v] += m * x[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) out[r * NV + v] = sum[r][v];
}

// out = M in + bias, M (rows, columns) with `ld` numbers from row to row
template <class T>
inline void product(const T *M, Index ld, int rows, int columns, const Vec<T> *in, Vec<T> *out,
                    const T *bias = nullptr) {
    int i = 0;
    for (; i + RB <= rows; i += RB)
        product_rows<T, RB>(M + i * ld, ld, columns, in, bias ? bias + i : nullptr, out + i * NV);
    for (; i < rows; ++i)
        product_rows<T, 1>(M + i * ld, ld, columns, in, bias ? bias + i : nullptr, out + i * NV);
}

template <class T>
struct Term {  // of a sum of outer products
    const Vec<T> *x, *y;
};

template <class T, int R, int C>
inline void outer_block(Vec<T> *G, Index ld, const Term<T> *terms, int count, int i, int j) {
    Vec<T> sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = G[r * ld + c];
    for (int n = 0; n < count; ++n) {
        const Vec<T> *x = terms[n].x + i * NV, *y = terms[n].y + j * NV;
        for (int v = 0; v < NV; ++v) {
            Vec<T> right[C];
            for (int c = 0; c < C; ++c) right[c] = y[c * NV + v];
            for (int r = 0; r < R; ++r) {
                Vec<T> left = x[r * NV + v];
                for (int c = 0; c < C; ++c) sum[r][c] += left * right[c];
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) G[r * ld + c] = sum[r][c];
}

// G (rows, columns), `ld` numbers from row to row, += sum over terms of x y^T, lane by lane.
template <class T>
inline void outer(Vec<T> *G, Index ld, int rows, int columns, const Term<T> *terms, int count) {
    constexpr int R = PATHLINE_BYTES == 64 ? 4 : 2, C = 4;
    for (int i = 0; i < rows;) {
        bool block = i + R <= rows;
        for (int j = 0; j < columns;) {
            Vec<T> *at = G + i * ld + j;
            bool wide = j + C <= columns;
            if (block && wide) outer_block<T, R, C>(at, ld, terms, count, i, j);
            else if (block) outer_block<T, R, 1>(at, ld, terms, count, i, j);
            else if (wide) outer_block<T, 1, C>(at, ld, terms, count, i, j);
            else outer_block<T, 1, 1>(at, ld, terms, count, i, j);
            j += wide ? C : 1;
        }
        i += block ? R : 1;
    }
}

// The workspace of one thread ---------------------------------------------------------------------

constexpr int GROUP = 4;             // columns of the Jacobian that the trace works on at once
constexpr Index TAPE_BYTES = 1 << 20;  // kept tapes should stay in the cache

template <class T>
struct Arena {  // counts bytes where it has none
    char *base;
    std::size_t used;
    template <class E>
    E *take(Index count) {
        E *at = base ? (E *)(base + used) : nullptr;
        used += (std::size_t(count) * sizeof(E) + 63) / 64 * 64;
        return at;
    }
};

template <class T>
struct Tape {  // an evaluation of grad Phi: what its derivative needs
    Vec<T> *s, *tanh, *u, *z, *As, *grad;
};

template <class T>
class Rollout {
    using V = Vec<T>;
    static constexpr int L = width_of<T>;
    static constexpr int S = L * NV;

    const Task<T> &task;
    const int d, D, m, depth, rank, M, N;
    const T h;  // of the residual layers
    const T dt;
    const T *w, *A, *b;
    const T **K, **bias;  // of each layer
    T **Kt;               // transposed
    T *K0t, *At, *k2;     // k2: |row of K_0 over x|^2
    int columns;          // of the frame
    Index stride;         // of the next two
    const T *K0E;         // (m, columns)
    V *G_K0E;
    V *signs, *column_e;  // a probe, and K_0 times it
    T quadratic;          // |A over x|^2
    // sums over samples, lane by lane
    V *G_w, *G_A, *G_b, **G_K, **G_bias, *G_slope, *G_alpha;
    // tapes and scratch
    Index kept;  // steps whose tapes are kept
    Tape<T> *tapes;
    V *nodes, *y, *inputs;
    V *dT, *dZ, *hg, *da, *slope, *Q, *q, *Aq, *ds, *column, *P, *J, *dJ;
    V *lambda, *d_f, *d_next, *dx, *dk, *d_f0, *d_context;
    V *cost, *log_det, *hjb, *alpha;
    V *a_cost, *a_log_det, *a_hjb;

  public:
    Rollout(const Task<T> &task, void *workspace, std::size_t *bytes = nullptr)
        : task(task), d(task.dim), D(task.inputs()), m(task.width), depth(task.depth),
          rank(task.rank), M(task.depth - 1), N(task.steps), h(T(1) / (M > 0 ? M : 1)),
          dt(T((task.stop - task.start) / task.steps)) {
        Arena<T> arena{(char *)workspace, 0};
        lay_out(arena);
        if (bytes) *bytes = arena.used;
        if (workspace) prepare();
    }

    void run(Index first, Index last) {
        for (Index tile = first; tile < last; ++tile) one(tile * S);
        if (task.gradient) add_up();
    }

  private:
    Tape<T> tape(Arena<T> &arena) {
        Tape<T> t;
        t.s = arena.template take<V>(D * NV);
        t.tanh = arena.template take<V>(Index(depth) * m * NV);
        t.u = arena.template take<V>(Index(depth) * m * NV);
        t.z = arena.template take<V>(Index(depth) * m * NV);
        t.As = arena.template take<V>(rank * NV);
        t.grad = arena.template take<V>(D * NV);
        return t;
    }

    void lay_out(Arena<T> &arena) {
        K = arena.template take<const T *>(depth);
        bias = arena.template take<const T *>(depth);
        Kt = arena.template take<T *>(depth);
        G_K = arena.template take<V *>(depth);
        G_bias = arena.template take<V *>(depth);
        K0t = arena.template take<T>(Index(m) * D);
        At = arena.template take<T>(Index(rank) * D);
        k2 = arena.template take<T>(m);
        columns = task.probe ? 1 : task.frame ? task.columns : d;
        stride = task.frame ? columns : D;
        K0E = task.frame ? arena.template take<T>(m * stride) : nullptr;
        G_K0E = task.frame && task.gradient ? arena.template take<V>(m * stride) : nullptr;
        signs = arena.template take<V>(task.probe ? d * NV : 0);
        column_e = arena.template take<V>(task.probe ? m * NV : 0);
        for (int i = 1; i < depth; ++i) {
            T *at = arena.template take<T>(Index(m) * m);
            if (Kt) Kt[i] = at;
        }
        std::size_t before = arena.used;
        tape(arena);
        Index size = Index(arena.used - before);
        arena.used = before;
        if (task.gradient) {
            kept = TAPE_BYTES / (5 * size);
            kept = kept > N ? N : kept;
        } else {
            kept = 0;
        }
        // Five evaluations for each kept step and for two others, and the last node.
        Index count = 5 * (kept + 2) + 1;
        tapes = arena.template take<Tape<T>>(count);
        for (Index i = 0; i < count; ++i) {
            Tape<T> one = tape(arena);
            if (tapes) tapes[i] = one;
        }
        nodes = arena.template take<V>(Index(task.gradient ? N + 1 : 2) * d * NV);
        y = arena.template take<V>(D * NV);
        inputs = arena.template take<V>(D * NV);
        slope = arena.template take<V>(Index(depth) * m * NV);
        Q = arena.template take<V>(Index(depth) * m * NV);
        column = arena.template take<V>(m * NV);
        P = arena.template take<V>(Index(GROUP) * depth * m * NV);
        J = arena.template take<V>(Index(GROUP) * depth * m * NV);
        cost = arena.template take<V>(NV);
        log_det = arena.template take<V>(NV);
        hjb = arena.template take<V>(NV);
        alpha = arena.template take<V>(NV);
        if (!task.gradient) return;
        dT = arena.template take<V>(Index(depth) * m * NV);
        dZ = arena.template take<V>(Index(depth + 1) * m * NV);
        hg = arena.template take<V>(Index(depth) * m * NV);
        da = arena.template take<V>(Index(depth) * m * NV);
        dJ = arena.template take<V>(Index(m) * NV);
        q = arena.template take<V>(D * NV);
        Aq = arena.template take<V>(rank * NV);
        ds = arena.template take<V>(D * NV);
        lambda = arena.template take<V>(d * NV);
        d_f = arena.template take<V>(d * NV);
        d_next = arena.template take<V>(d * NV);
        dx = arena.template take<V>(d * NV);
        dk = arena.template take<V>(d * NV);
        d_f0 = arena.template take<V>(d * NV);
        d_context = arena.template take<V>((task.context_dim + 1) * NV);
        a_cost = arena.template take<V>(NV);
        a_log_det = arena.template take<V>(NV);
        a_hjb = arena.template take<V>(NV);
        G_w = arena.template take<V>(m);
        G_A = arena.template take<V>(Index(rank) * D);
        G_b = arena.template take<V>(D);
        G_slope = arena.template take<V>(m);
        G_alpha = arena.template take<V>(1);
        for (int i = 0; i < depth; ++i) {
            V *matrix = arena.template take<V>(Index(m) * (i ? m : D));
            V *vector = arena.template take<V>(m);
            if (G_K) G_K[i] = matrix, G_bias[i] = vector;
        }
    }

    void prepare() {
        const T *at = task.theta;
        w = at, at += m;
        A = at, at += Index(rank) * D;
        b = at, at += D;
        for (int i = 0; i < depth; ++i) {
            int columns = i ? m : D;
            K[i] = at, at += Index(m) * columns;
            bias[i] = at, at += m;
            T *to = i ? Kt[i] : K0t;
            for (int r = 0; r < m; ++r)
                for (int c = 0; c < columns; ++c) to[Index(c) * m + r] = K[i][Index(r) * columns + c];
        }
        quadratic = 0;
        for (int r = 0; r < rank; ++r)
            for (int c = 0; c < D; ++c) {
                T a = A[Index(r) * D + c];
                At[Index(c) * rank + r] = a;
                if (c < d) quadratic += a * a;
            }
        for (int r = 0; r < m; ++r) {
            k2[r] = 0;
            for (int c = 0; c < d; ++c) k2[r] += K[0][Index(r) * D + c] * K[0][Index(r) * D + c];
        }
        if (task.frame) {
            T *to = (T *)K0E;
            for (int r = 0; r < m; ++r)
                for (int c = 0; c < columns; ++c, ++to) {
                    *to = 0;
                    for (int k = 0; k < d; ++k)
                        *to += K[0][Index(r) * D + k] * task.frame[Index(k) * columns + c];
                }
        } else {
            K0E = K[0];
        }
        if (!task.gradient) return;
        if (task.frame) zero(G_K0E, m * stride);
        else G_K0E = G_K[0];
        zero(G_w, m), zero(G_A, Index(rank) * D), zero(G_b, D), zero(G_slope, m), zero(G_alpha, 1);
        for (int i = 0; i < depth; ++i) zero(G_K[i], Index(m) * (i ? m : D)), zero(G_bias[i], m);
    }

    static void zero(V *x, Index count) {
        for (Index i = 0; i < count; ++i) x[i] = V{};
    }

    static void copy(const V *from, V *to, Index count) {
        for (Index i = 0; i < count; ++i) to[i] = from[i];
    }

    // Phi ---------------------------------------------------------------------------------------

    // grad Phi at `tape.s`, whose rows of x are `x`; t is in units of the caller.
    void evaluate(Tape<T> &tape, const V *x, T t) {
        copy(x, tape.s, d * NV);
        for (int v = 0; v < NV; ++v) tape.s[d * NV + v] = all<T>(t);
        copy(y + (d + 1) * NV, tape.s + (d + 1) * NV, (D - d - 1) * NV);  // the context
        const int n = m * NV;
        for (int i = 0; i < depth; ++i) {
            V *T_i = tape.tanh + Index(i) * n, *u = tape.u + Index(i) * n;
            product<T>(K[i], i ? m : D, m, i ? m : D, i ? u - n : tape.s, T_i, bias[i]);
            V unused;
            if (i == M) {
                for (int k = 0; k < n; ++k) activate<T, false>(T_i[k], T_i[k], unused);
            } else {
                for (int k = 0; k < n; ++k) {
                    V value;
                    activate<T, true>(T_i[k], T_i[k], value);
                    u[k] = i ? u[k - n] + h * value : value;
                }
            }
        }
        // z_i, i = M .. 1; z_{M+1} = w
        for (int i = M; i >= 1; --i) {
            const V *T_i = tape.tanh + Index(i) * n;
            V *g = column, *z = tape.z + Index(i) * n;  // z_i at index i, i = 1..M
            for (int j = 0; j < m; ++j)
                for (int v = 0; v < NV; ++v)
                    g[j * NV + v] = T_i[j * NV + v] * above(tape, i, j, v);
            product<T>(Kt[i], m, m, m, g, z);
            for (int j = 0; j < m; ++j)
                for (int v = 0; v < NV; ++v)
                    z[j * NV + v] = above(tape, i, j, v) + h * z[j * NV + v];
        }
        for (int j = 0; j < m; ++j)
            for (int v = 0; v < NV; ++v)
                column[j * NV + v] = tape.tanh[j * NV + v] * above(tape, 0, j, v);
        product<T>(K0t, m, D, m, column, tape.grad, b);
        product<T>(A, D, rank, D, tape.s, tape.As);
        product<T>(At, rank, D, rank, tape.As, inputs);
        for (int k = 0; k < D * NV; ++k) tape.grad[k] += inputs[k];
    }

    // z_{i+1}: above the last layer it is w.
    V above(const Tape<T> &tape, int i, int j, int v) const {
        return i == M ? all<T>(w[j]) : tape.z[(Index(i + 1) * m + j) * NV + v];
    }

    // The Laplacian. With `adjoint`, alpha times its derivative in tanh (to dT), in the slopes (to
    // dS, stored in Q) and in the weights.
    void laplacian(const Tape<T> &tape, V *value, bool adjoint) {
        const int n = m * NV;
        for (int i = 0; i < depth; ++i)
            for (int j = 0; j < m; ++j)
                for (int v = 0; v < NV; ++v) {
                    V T_i = tape.tanh[Index(i) * n + j * NV + v];
                    slope[Index(i) * n + j * NV + v] = (T(1) - T_i * T_i) * above(tape, i, j, v);
                }
        zero(Q, Index(depth) * n);
        for (int k0 = 0; k0 < (M ? columns : 0); k0 += GROUP) {
            int count = columns - k0 < GROUP ? columns - k0 : GROUP;
            for (int c = 0; c < count; ++c) jacobian_column(tape, k0 + c, c, adjoint);
            if (!adjoint) continue;
            for (int i = 1; i <= M; ++i) {
                Term<T> terms[GROUP];
                for (int c = 0; c < count; ++c) terms[c] = {at(P, c, i), at(J, c, i - 1)};
                outer<T>(G_K[i], m, m, m, terms, count);
            }
        }
        for (int v = 0; v < NV; ++v) {
            V sum = all<T>(quadratic);
            for (int j = 0; j < m; ++j) sum += slope[j * NV + v] * k2[j];
            for (int i = 1; i <= M; ++i) {
                V layer{};
                for (int j = 0; j < m; ++j)
                    layer += slope[Index(i) * n + j * NV + v] * Q[Index(i) * n + j * NV + v];
                sum += h * layer;
            }
            value[v] = sum;
        }
        if (!adjoint) return;
        for (int v = 0; v < NV; ++v) *G_alpha += alpha[v];
        for (int j = 0; j < m; ++j)
            for (int v = 0; v < NV; ++v) {
                G_slope[j] += alpha[v] * slope[j * NV + v];
                Q[j * NV + v] = alpha[v] * k2[j];
                for (int i = 1; i <= M; ++i) Q[Index(i) * n + j * NV + v] *= alpha[v] * h;
            }
    }

    V *at(V *array, int c, int layer) { return array + (Index(c) * depth + layer) * m * NV; }

    // Column k of the Jacobians J_i E of u_i and P_i = K_i J_{i-1}; into place c of the group.
    void jacobian_column(const Tape<T> &tape, int k, int c, bool adjoint) {
        const int n = m * NV;
        V *J_0 = at(J, c, 0);
        for (int j = 0; j < m; ++j)
            for (int v = 0; v < NV; ++v)
                J_0[j * NV + v] = tape.tanh[j * NV + v] * entry(j, k, v);
        for (int i = 1; i <= M; ++i) {
            V *P_i = at(P, c, i), *sums = Q + Index(i) * n;
            product<T>(K[i], m, m, m, at(J, c, i - 1), P_i);
            for (int e = 0; e < n; ++e) sums[e] += P_i[e] * P_i[e];
            if (i == M) continue;
            V *J_i = at(J, c, i);
            const V *T_i = tape.tanh + Index(i) * n;
            for (int e = 0; e < n; ++e) J_i[e] = J_i[e - n] + h * T_i[e] * P_i[e];
        }
        if (!adjoint) return;
        V *dJ_i = dJ;  // of J_i, from i = M - 1 down
        for (int i = M; i >= 1; --i) {
            V *P_i = at(P, c, i), *S_i = slope + Index(i) * n;
            const V *T_i = tape.tanh + Index(i) * n;
            for (int j = 0; j < m; ++j)
                for (int v = 0; v < NV; ++v) {
                    int e = j * NV + v;
                    V dP = (T(2) * h) * alpha[v] * S_i[e] * P_i[e];
                    if (i < M) {
                        dT[Index(i) * n + e] += h * P_i[e] * dJ_i[e];
                        dP += h * T_i[e] * dJ_i[e];
                    }
                    P_i[e] = dP;
                }
            product<T>(Kt[i], m, m, m, P_i, column);
            for (int e = 0; e < n; ++e) dJ_i[e] = i < M ? dJ_i[e] + column[e] : column[e];
        }
        for (int j = 0; j < m; ++j)
            for (int v = 0; v < NV; ++v) {
                int e = j * NV + v;
                dT[e] += entry(j, k, v) * dJ_i[e];
                dJ_i[e] *= tape.tanh[e];
                if (!task.probe) G_K0E[j * stride + k] += dJ_i[e];
            }
        if (task.probe) {
            Term<T> term{dJ_i, signs};
            outer<T>(G_K[0], D, m, d, &term, 1);
        }
    }

    V entry(int j, int k, int v) const {  // of K_0 E
        return task.probe ? column_e[j * NV + v] : all<T>(K0E[j * stride + k]);
    }

    // ds = q . (derivative of grad Phi in s) + alpha . (derivative of lap Phi in s), and the same
    // for the parameters.
    void pull_back(const Tape<T> &tape, bool traced, V *trace) {
        const int n = m * NV;
        zero(dT, Index(depth) * n);
        if (traced) laplacian(tape, trace, true);
        else zero(Q, Index(depth) * n);
        // up: dZ[i] belongs to z_{i+1}
        product<T>(K[0], D, m, D, q, dZ);
        V *g0 = hg;
        for (int j = 0; j < m; ++j)
            for (int v = 0; v < NV; ++v) {
                int e = j * NV + v;
                V T_0 = tape.tanh[e], z = above(tape, 0, j, v), r = dZ[e];
                g0[e] = T_0 * z;
                dZ[e] = T_0 * r + (T(1) - T_0 * T_0) * Q[e];
                dT[e] += z * (r - T(2) * T_0 * Q[e]);
            }
        for (int i = 1; i <= M; ++i) {
            V *below = dZ + Index(i - 1) * n, *dz = dZ + Index(i) * n;
            product<T>(K[i], m, m, m, below, dz);
            for (int j = 0; j < m; ++j)
                for (int v = 0; v < NV; ++v) {
                    Index e = Index(i) * n + j * NV + v;
                    V T_i = tape.tanh[e], z = above(tape, i, j, v), dg = h * dZ[e];
                    hg[e] = h * T_i * z;
                    dZ[e] = dZ[e - n] + T_i * dg + (T(1) - T_i * T_i) * Q[e];
                    dT[e] += z * (dg - T(2) * T_i * Q[e]);
                }
        }
        V *top = dZ + Index(M) * n;
        for (int j = 0; j < m; ++j)
            for (int v = 0; v < NV; ++v) G_w[j] += top[j * NV + v];
        // down
        V *du = dJ;
        for (int i = M; i >= 0; --i) {
            for (int j = 0; j < m; ++j) {
                V sum{};
                for (int v = 0; v < NV; ++v) {
                    Index e = Index(i) * n + j * NV + v;
                    V T_i = tape.tanh[e];
                    V d_a = (T(1) - T_i * T_i) * dT[e];
                    if (i < M) d_a += (i ? h : T(1)) * T_i * du[j * NV + v];
                    da[e] = d_a;
                    sum += d_a;
                }
                G_bias[i][j] += sum;
            }
            if (i == 0) break;
            V *d_i = da + Index(i) * n;
            Term<T> terms[2] = {{hg + Index(i) * n, dZ + Index(i - 1) * n},
                                {d_i, tape.u + Index(i - 1) * n}};
            outer<T>(G_K[i], m, m, m, terms, 2);
            product<T>(Kt[i], m, m, m, d_i, column);
            for (int e = 0; e < n; ++e) du[e] = i < M ? du[e] + column[e] : column[e];
        }
        Term<T> first[2] = {{g0, q}, {da, tape.s}};
        outer<T>(G_K[0], D, m, D, first, 2);
        product<T>(A, D, rank, D, q, Aq);
        Term<T> quadratics[2] = {{tape.As, q}, {Aq, tape.s}};
        outer<T>(G_A, D, rank, D, quadratics, 2);
        product<T>(K0t, m, D, m, da, ds);
        product<T>(At, rank, D, rank, Aq, inputs);
        for (int k = 0; k < D; ++k)
            for (int v = 0; v < NV; ++v) {
                ds[k * NV + v] += inputs[k * NV + v];
                G_b[k] += q[k * NV + v];
            }
        for (int k = 0; k < (D - d - 1) * NV; ++k) d_context[k] += ds[(d + 1) * NV + k];
    }

    // The path -----------------------------------------------------------------------------------

    void load(const T *from, Index first, Index columns, V *to) const {
        for (Index c = 0; c < columns; ++c)
            for (int s = 0; s < S; ++s) {
                Index row = first + s < task.batch ? first + s : task.batch - 1;
                ((T *)(to + c * NV))[s] = from ? from[row * columns + c] : T(0);
            }
    }

    void load_adjoint(const T *from, Index first, Index columns, V *to) const {
        load(from, first, columns, to);
        for (Index c = 0; c < columns; ++c)
            for (int s = 0; s < S; ++s)
                if (first + s >= task.batch) ((T *)(to + c * NV))[s] = T(0);
    }

    void store(const V *from, Index first, Index columns, T *to) const {
        if (!to) return;
        for (Index c = 0; c < columns; ++c)
            for (int s = 0; s < S && first + s < task.batch; ++s)
                to[(first + s) * columns + c] = ((const T *)(from + c * NV))[s];
    }

    T time(int n, T share = T(0)) const {
        return T(task.start + (task.stop - task.start) * (double(n) + double(share)) / N);
    }

    // Adds weight * (cost, hjb) at an evaluation; the Laplacian only in the forward-only pass.
    void rates(const Tape<T> &tape, T weight) {
        V trace[NV];
        if (!task.gradient) laplacian(tape, trace, false);
        for (int v = 0; v < NV; ++v) {
            V half{};
            for (int k = 0; k < d; ++k) half += tape.grad[k * NV + v] * tape.grad[k * NV + v];
            half *= T(0.5);
            cost[v] += weight * half;
            hjb[v] += weight * absolute<T>(tape.grad[d * NV + v] - half);
            if (!task.gradient) log_det[v] -= weight * trace[v];
        }
    }

    // q for the adjoint `d_dz` of dz/dt = -grad_x Phi and the rates' weight; then back to x.
    void adjoint(const Tape<T> &tape, const V *d_dz, T weight, V *dx) {
        V trace[NV];
        bool rated = weight != T(0);
        for (int v = 0; v < NV; ++v) {
            V half{}, sign{};
            if (rated) {
                for (int k = 0; k < d; ++k) half += tape.grad[k * NV + v] * tape.grad[k * NV + v];
                V residual = tape.grad[d * NV + v] - T(0.5) * half;
                V one = all<T>(weight) * a_hjb[v];
                sign = residual > T(0) ? one : (residual < T(0) ? -one : V{});
                alpha[v] = -weight * a_log_det[v];
            }
            for (int k = 0; k < d; ++k) {
                V p = tape.grad[k * NV + v];
                V value = d_dz ? -d_dz[k * NV + v] : V{};
                if (rated) value += p * (weight * a_cost[v] - sign);
                q[k * NV + v] = value;
            }
            q[d * NV + v] = sign;
            for (int k = d + 1; k < D; ++k) q[k * NV + v] = V{};
        }
        pull_back(tape, rated, trace);
        if (rated)
            for (int v = 0; v < NV; ++v) log_det[v] -= weight * trace[v];
        copy(ds, dx, d * NV);
    }

    Tape<T> *slot(int n) { return tapes + 5 * (n >= N - kept ? n - (N - kept) : kept + n % 2); }
    Tape<T> &node_tape(int n) { return n == N ? tapes[5 * (kept + 2)] : slot(n)[0]; }
    V *node(int n) { return nodes + Index(task.gradient ? n : n % 2) * d * NV; }

    // The evaluations of step n, from the tape of its first node on. `last`: also at its end.
    void step(int n, bool last) {
        const V *z = node(n);
        Tape<T> *own = slot(n);
        const V *k1 = own[0].grad;
        static constexpr T share[3] = {T(0.5), T(0.5), T(1)};
        const V *before = k1;
        for (int stage = 0; stage < 3; ++stage) {
            for (int e = 0; e < d * NV; ++e) y[e] = z[e] - dt * share[stage] * before[e];
            evaluate(own[1 + stage], y, time(n, share[stage]));
            before = own[1 + stage].grad;
        }
        const V *k2_ = own[1].grad, *k3 = own[2].grad, *k4 = own[3].grad;
        V *next = node(n + 1);
        if (last)
            for (int e = 0; e < d * NV; ++e)
                next[e] = z[e] - dt * T(1.0 / 6) * (k1[e] + T(2) * (k2_[e] + k3[e]) + k4[e]);
        if (!task.integrals) return;
        if (last) evaluate(node_tape(n + 1), next, time(n + 1));
        const V *k5 = node_tape(n + 1).grad;
        for (int e = 0; e < d * NV; ++e)
            y[e] = T(0.5) * (z[e] + next[e]) - dt * T(0.125) * (k1[e] - k5[e]);
        evaluate(own[4], y, time(n, T(0.5)));
    }

    void one(Index first) {
        const T sixth = dt * T(1.0 / 6);
        if (task.context_dim) load(task.context, first, task.context_dim, y + (d + 1) * NV);
        if (task.probe) {
            load(task.probe, first, d, signs);
            product<T>(K[0], D, m, d, signs, column_e);
        }
        load(task.x, first, d, node(0));
        zero(cost, NV), zero(log_det, NV), zero(hjb, NV);
        evaluate(node_tape(0), node(0), time(0));
        if (task.integrals) rates(node_tape(0), sixth);
        for (int n = 0; n < N; ++n) {
            if (n && !task.integrals) evaluate(node_tape(n), node(n), time(n));
            step(n, true);
            if (!task.integrals) continue;
            rates(slot(n)[4], T(4) * sixth);
            rates(node_tape(n + 1), (n + 1 < N ? T(2) : T(1)) * sixth);
        }
        store(node(N), first, d, task.z);
        if (task.gradient) back(first);
        store(cost, first, 1, task.cost);
        store(hjb, first, 1, task.hjb);
        store(log_det, first, 1, task.log_det);
    }

    void back(Index first) {
        const T sixth = dt * T(1.0 / 6);
        const int n_x = d * NV;
        load_adjoint(task.d_cost, first, 1, a_cost);
        load_adjoint(task.d_log_det, first, 1, a_log_det);
        load_adjoint(task.d_hjb, first, 1, a_hjb);
        load_adjoint(task.d_z, first, d, lambda);
        if (task.a_terminal) {
            V a[NV];
            load_adjoint(task.a_terminal, first, 1, a);
            for (int e = 0; e < n_x; ++e) lambda[e] += a[e % NV] * node(N)[e];
        }
        zero(d_context, (task.context_dim + 1) * NV);
        zero(d_f, n_x);  // of dz/dt at node n + 1
        for (int n = N - 1; n >= 0; --n) {
            if (n < N - kept) {
                evaluate(node_tape(n), node(n), time(n));
                step(n, false);
            }
            Tape<T> *own = slot(n);
            zero(d_next, n_x);  // of z_n
            zero(d_f0, n_x);    // of dz/dt at node n
            if (task.integrals) {
                adjoint(own[4], nullptr, T(4) * sixth, dx);
                for (int e = 0; e < n_x; ++e) {
                    d_next[e] += T(0.5) * dx[e];
                    lambda[e] += T(0.5) * dx[e];
                    d_f0[e] += dt * T(0.125) * dx[e];
                    d_f[e] -= dt * T(0.125) * dx[e];
                }
                adjoint(node_tape(n + 1), d_f, (n + 1 < N ? T(2) : T(1)) * sixth, dx);
                for (int e = 0; e < n_x; ++e) lambda[e] += dx[e];
            } else if (n + 1 < N) {
                adjoint(node_tape(n + 1), d_f, T(0), dx);
                for (int e = 0; e < n_x; ++e) lambda[e] += dx[e];
            }
            // z_{n+1} = z_n + dt/6 (k1 + 2 k2 + 2 k3 + k4)
            for (int e = 0; e < n_x; ++e) {
                d_next[e] += lambda[e];
                dk[e] = sixth * lambda[e];
                d_f0[e] += dk[e];
            }
            static constexpr T carried[3] = {T(1), T(0.5), T(0.5)};
            for (int stage = 3; stage >= 1; --stage) {
                adjoint(own[stage], dk, T(0), dx);
                for (int e = 0; e < n_x; ++e) {
                    d_next[e] += dx[e];
                    V through = dt * carried[3 - stage] * dx[e];
                    if (stage == 1) d_f0[e] += through;
                    else dk[e] = T(2) * sixth * lambda[e] + through;
                }
            }
            copy(d_f0, d_f, n_x);
            copy(d_next, lambda, n_x);
        }
        adjoint(node_tape(0), d_f, task.integrals ? sixth : T(0), dx);
        for (int e = 0; e < n_x; ++e) lambda[e] += dx[e];
        store(lambda, first, d, task.d_x);
        store(d_context, first, task.context_dim, task.d_context);
    }

    static T sum(const V &x) {
        T part[L];
        for (int lane = 0; lane < L; ++lane) part[lane] = x[lane];
        for (int half = L / 2; half; half /= 2)  // in pairs: no addition waits for the one before
            for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
        return part[0];
    }

    Index offset_K0() const { return m + Index(rank + 1) * D; }

    void add_up() {
        T *to = task.d_theta;
        if (task.frame)
            for (int j = 0; j < m; ++j)
                for (int c = 0; c < columns; ++c) {
                    T g = sum(G_K0E[j * stride + c]);
                    for (int k = 0; k < d; ++k)
                        to[offset_K0() + Index(j) * D + k] += g * task.frame[Index(k) * columns + c];
                }
        for (int j = 0; j < m; ++j) to[j] += sum(G_w[j]);
        to += m;
        T alphas = T(2) * sum(*G_alpha);
        for (int r = 0; r < rank; ++r)
            for (int c = 0; c < D; ++c, ++to)
                *to += sum(G_A[Index(r) * D + c]) + (c < d ? alphas * A[Index(r) * D + c] : T(0));
        for (int c = 0; c < D; ++c) to[c] += sum(G_b[c]);
        to += D;
        for (int i = 0; i < depth; ++i) {
            int columns = i ? m : D;
            for (int j = 0; j < m; ++j) {
                T slopes = i ? T(0) : T(2) * sum(G_slope[j]);
                for (int c = 0; c < columns; ++c, ++to) {
                    *to += sum(G_K[i][Index(j) * columns + c]);
                    if (i == 0 && c < d) *to += slopes * K[0][Index(j) * D + c];
                }
            }
            for (int j = 0; j < m; ++j) to[j] += sum(G_bias[i][j]);
            to += m;
        }
    }
};

template <class T>
std::size_t workspace(const Task<T> &task) {
    std::size_t bytes = 0;
    Rollout<T>(task, nullptr, &bytes);
    return bytes;
}

template <class T>
void run(const Task<T> &task, Index first, Index last, void *memory) {
    Rollout<T>(task, memory).run(first, last);
}

}  // namespace

extern const Kernel<float> single{width_of<float> * NV, workspace<float>, run<float>};
extern const Kernel<double> twofold{width_of<double> * NV, workspace<double>, run<double>};

}  // namespace PATHLINE_ISA
}  // namespace pathline
