// The Python face of the kernels: picks the instruction set, shares tiles among threads.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include "filters.hpp"
#include "kernel.hpp"
#include "norms.hpp"

namespace nb = nanobind;

namespace pathline {
namespace {

struct Isa {
    const char *name;
    const Kernel<float> &single;
    const Kernel<double> &twofold;
    const Norm<float> &norm_single;
    const Norm<double> &norm_twofold;
    const Filter<float> &filter_single;
    const Filter<double> &filter_twofold;
    bool (*runs)();
};

const Isa isas[] = {
#ifdef PATHLINE_HAS_X86_VARIANTS
    {"avx512", avx512::single, avx512::twofold, avx512::norm_single, avx512::norm_twofold,
     avx512::filter_single, avx512::filter_twofold,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi2");
     }},
    {"avx2", avx2::single, avx2::twofold, avx2::norm_single, avx2::norm_twofold,
     avx2::filter_single, avx2::filter_twofold,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
     }},
#endif
    {"baseline", baseline::single, baseline::twofold, baseline::norm_single, baseline::norm_twofold,
     baseline::filter_single, baseline::filter_twofold, [] { return true; }},
};

const Isa *chosen = nullptr;

void choose(const char *name) {
    for (const Isa &isa : isas)
        if ((!name || !std::strcmp(name, isa.name)) && isa.runs()) {
            chosen = &isa;
            return;
        }
    throw nb::value_error("no such instruction set on this processor");
}

const Kernel<float> &kernel(float) { return chosen->single; }
const Kernel<double> &kernel(double) { return chosen->twofold; }
const Norm<float> &norm(float) { return chosen->norm_single; }
const Norm<double> &norm(double) { return chosen->norm_twofold; }
const Filter<float> &filter(float) { return chosen->filter_single; }
const Filter<double> &filter(double) { return chosen->filter_twofold; }

// work(i) for i from 0 to count, by a thread each
template <class Work>
void among(std::ptrdiff_t count, const Work &work) {
    std::vector<std::thread> others;
    for (std::ptrdiff_t thread = 1; thread < count; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread &other : others) other.join();
}

// Memory that stays between calls: to map and clear it anew would take longer than small steps.
class Workspaces {
    struct Block {
        void *memory;
        std::size_t bytes;
    };
    std::vector<Block> free_;
    std::mutex mutex_;

  public:
    void *take(std::size_t bytes) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (auto block = free_.begin(); block != free_.end(); ++block)
                if (block->bytes >= bytes) {
                    void *memory = block->memory;
                    free_.erase(block);
                    return memory;
                }
        }
        // The size stands before the memory.
        std::size_t whole = (bytes + 127) / 64 * 64 + 64;
        char *memory = static_cast<char *>(::operator new(whole, std::align_val_t(64)));
        std::memcpy(memory, &bytes, sizeof bytes);
        return memory + 64;
    }

    void give(void *memory) {
        std::size_t bytes;
        std::memcpy(&bytes, static_cast<char *>(memory) - 64, sizeof bytes);
        std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back({memory, bytes});
        if (free_.size() > 64) {  // a program with many shapes: drop the oldest
            ::operator delete(static_cast<char *>(free_.front().memory) - 64, std::align_val_t(64));
            free_.erase(free_.begin());
        }
    }
};

Workspaces workspaces;

constexpr std::ptrdiff_t SHARE = 4;  // tiles; more would leave threads idle, fewer cost more sums
constexpr std::ptrdiff_t MOST_SHARES = 64;

// Shares depend on the batch alone, and their sums are added in order: the bits of a result are the
// same for any number of threads.
template <class T>
void run(const Task<T> &task, int threads) {
    const Kernel<T> &kernel = pathline::kernel(T());
    const std::ptrdiff_t tiles = (task.batch + kernel.tile - 1) / kernel.tile;
    const std::ptrdiff_t shares = std::clamp<std::ptrdiff_t>(tiles / SHARE, 1, MOST_SHARES);
    const std::ptrdiff_t count = std::clamp<std::ptrdiff_t>(threads, 1, shares);
    const std::size_t size = task.gradient ? std::size_t(task.parameters()) : 0;
    if (size) std::fill_n(task.d_theta, size, T(0));
    std::vector<std::vector<T>> sums(shares - 1, std::vector<T>(size));
    auto work = [&](std::ptrdiff_t thread) {
        Task<T> own = task;
        void *memory = workspaces.take(kernel.workspace(own));
        for (auto i = shares * thread / count; i < shares * (thread + 1) / count; ++i) {
            if (i) own.d_theta = sums[i - 1].data();
            kernel.run(own, tiles * i / shares, tiles * (i + 1) / shares, memory);
        }
        workspaces.give(memory);
    };
    among(count, work);
    for (const std::vector<T> &sum : sums)
        for (std::size_t k = 0; k < size; ++k) task.d_theta[k] += sum[k];
}

template <class T>
using Array = std::optional<nb::ndarray<T, nb::c_contig, nb::device::cpu>>;

template <class T>
T *data(const Array<T> &array, std::size_t size, const char *name) {
    if (!array) return nullptr;
    if (array->size() != size) {
        std::string text = std::string("`") + name + "` must have " + std::to_string(size) +
                           " elements, got " + std::to_string(array->size());
        throw nb::value_error(text.c_str());
    }
    return array->data();
}

template <class T>
void rollout(int dim, int context_dim, int width, int depth, int rank, int steps, double start,
             double stop, bool integrals, int threads, Array<T> theta, Array<T> x, Array<T> context,
             Array<T> frame, Array<T> probe, Array<T> z, Array<T> cost, Array<T> log_det, Array<T> hjb, Array<T> d_z,
             Array<T> a_terminal, Array<T> d_cost, Array<T> d_log_det, Array<T> d_hjb, Array<T> d_x,
             Array<T> d_context, Array<T> d_theta) {
    Task<T> task{};
    task.dim = dim, task.context_dim = context_dim, task.width = width, task.depth = depth;
    task.rank = rank, task.steps = steps, task.start = start, task.stop = stop;
    task.integrals = integrals;
    task.gradient = d_theta.has_value();
    if (!x || !theta || !z || dim < 1 || width < 1 || depth < 1 || rank < 1 || steps < 1)
        throw nb::value_error("a rollout needs theta, x, z and positive sizes");
    const std::size_t n = x->size() / dim;
    task.batch = std::ptrdiff_t(n);
    const std::size_t parameters = std::size_t(task.parameters());
    task.theta = data<T>(theta, parameters, "theta");
    task.x = data<T>(x, n * dim, "x");
    task.context = data<T>(context, n * context_dim, "context");
    if (context_dim && !context) throw nb::value_error("`context` is missing");
    task.columns = frame ? int(frame->size() / dim) : dim;
    task.frame = data<T>(frame, std::size_t(task.columns) * dim, "frame");
    task.probe = data<T>(probe, n * dim, "probe");
    task.z = data<T>(z, n * dim, "z");
    task.cost = data<T>(cost, n, "cost");
    task.log_det = data<T>(log_det, n, "log_det");
    task.hjb = data<T>(hjb, n, "hjb");
    task.d_z = data<T>(d_z, n * dim, "d_z");
    task.a_terminal = data<T>(a_terminal, n, "a_terminal");
    task.d_cost = data<T>(d_cost, n, "d_cost");
    task.d_log_det = data<T>(d_log_det, n, "d_log_det");
    task.d_hjb = data<T>(d_hjb, n, "d_hjb");
    task.d_x = data<T>(d_x, n * dim, "d_x");
    task.d_context = data<T>(d_context, n * context_dim, "d_context");
    task.d_theta = data<T>(d_theta, parameters, "d_theta");
    nb::gil_scoped_release release;
    run<T>(task, threads);
}

constexpr std::ptrdiff_t ROWS = 256;       // with sums of their own
constexpr std::ptrdiff_t NUMBERS = 1 << 18;  // less is not worth a thread

// Rows among threads; as above the bits are the same for any number of them.
template <class T>
void run(const NormTask<T> &task, T *d_scale, T *d_bias, int threads) {
    const Norm<T> &norm = pathline::norm(T());
    const std::ptrdiff_t n = task.channels, tiles = (task.rows + ROWS - 1) / ROWS;
    const std::ptrdiff_t most = std::max<std::ptrdiff_t>(task.rows * n / NUMBERS, 1);
    const std::ptrdiff_t count = std::clamp<std::ptrdiff_t>(threads, 1, most);
    std::vector<T> sums(d_scale ? tiles * 2 * n : 0);
    among(count, [&](std::ptrdiff_t thread) {
        for (auto i = tiles * thread / count; i < tiles * (thread + 1) / count; ++i) {
            const std::ptrdiff_t first = i * ROWS, last = std::min(first + ROWS, task.rows);
            if (d_scale) norm.backward(task, first, last, sums.data() + i * 2 * n);
            else norm.forward(task, first, last);
        }
    });
    for (std::ptrdiff_t j = 0; d_scale && j < n; ++j) {
        double scale = 0, bias = 0;
        for (std::ptrdiff_t i = 0; i < tiles; ++i) {
            scale += sums[(2 * i) * n + j];
            bias += sums[(2 * i + 1) * n + j];
        }
        d_scale[j] = T(scale), d_bias[j] = T(bias);
    }
}

// Arrays come by address, since arrays of nanobind would take longer than small norms.
using Address = std::uintptr_t;

template <class T>
void channel_norm(std::ptrdiff_t rows, std::ptrdiff_t channels, double small, bool relu, int threads,
                  Address z, Address scale, Address bias, Address y, Address d_y, Address d_z,
                  Address d_scale, Address d_bias) {
    auto in = [](Address address) { return reinterpret_cast<const T *>(address); };
    auto out = [](Address address) { return reinterpret_cast<T *>(address); };
    NormTask<T> task{rows,    channels,  T(small), relu,   in(z), in(scale),
                     in(bias), out(y), in(d_y),  out(d_z)};
    nb::gil_scoped_release release;
    run<T>(task, out(d_scale), out(d_bias), threads);
}

template <class T>
void define_norm(nb::module_ &m, const char *name) {
    m.def(name, &channel_norm<T>, nb::arg("rows"), nb::arg("channels"), nb::arg("small"),
          nb::arg("relu"), nb::arg("threads"), nb::arg("z"), nb::arg("scale"), nb::arg("bias"),
          nb::arg("y") = 0, nb::arg("d_y") = 0, nb::arg("d_z") = 0, nb::arg("d_scale") = 0,
          nb::arg("d_bias") = 0);
}

// cos and sin of 2 pi j k / n for j and k from 0 to n / 2, as in filters.hpp
template <class T>
struct Waves {
    std::vector<T> cosines, sines;

    explicit Waves(std::ptrdiff_t n) {
        const std::ptrdiff_t most = n / 2 + 1;
        for (std::ptrdiff_t j = 0; j < most; ++j)
            for (std::ptrdiff_t k = 0; k < most; ++k) {
                const double angle = 6.283185307179586477 * double(j * k % n) / double(n);
                cosines.push_back(T(std::cos(angle)));
                sines.push_back(T(std::sin(angle)));
            }
    }
};

// Channels among threads, as whole registers of them: the bits are the same for any number.
template <class T>
void filter_images(std::ptrdiff_t images, std::ptrdiff_t height, std::ptrdiff_t width,
                   std::ptrdiff_t channels, int threads, Address x, Address factors, Address y,
                   Address with, Address products) {
    auto in = [](Address address) { return reinterpret_cast<const T *>(address); };
    auto out = [](Address address) { return reinterpret_cast<T *>(address); };
    nb::gil_scoped_release release;
    const Filter<T> &filter = pathline::filter(T());
    const Waves<T> down(height), across(width);
    const FilterTask<T> task{images, height, width, channels, in(x), in(factors), out(y), in(with),
                             out(products), down.cosines.data(), down.sines.data(),
                             across.cosines.data(), across.sines.data()};
    const std::ptrdiff_t shares = (channels + filter.lanes - 1) / filter.lanes;
    const std::ptrdiff_t most = std::max<std::ptrdiff_t>(
        std::min(shares, images * height * width * channels / NUMBERS), 1);
    const std::ptrdiff_t count = std::clamp<std::ptrdiff_t>(threads, 1, most);
    among(count, [&](std::ptrdiff_t thread) {
        void *memory = workspaces.take(filter.workspace(task));
        const std::ptrdiff_t first = shares * thread / count * filter.lanes;
        const std::ptrdiff_t last = shares * (thread + 1) / count * filter.lanes;
        filter.run(task, first, std::min(last, channels), memory);
        workspaces.give(memory);
    });
}

template <class T>
void define_filter(nb::module_ &m, const char *name) {
    m.def(name, &filter_images<T>, nb::arg("images"), nb::arg("height"), nb::arg("width"),
          nb::arg("channels"), nb::arg("threads"), nb::arg("x"), nb::arg("factors"), nb::arg("y"),
          nb::arg("with_") = 0, nb::arg("products") = 0);
}

template <class T>
void define(nb::module_ &m) {
    auto array = [](const char *name) { return nb::arg(name).noconvert().none() = nb::none(); };
    m.def("rollout", &rollout<T>, nb::kw_only(), nb::arg("dim"), nb::arg("context_dim"),
          nb::arg("width"), nb::arg("depth"), nb::arg("rank"), nb::arg("steps"), nb::arg("start"),
          nb::arg("stop"), nb::arg("integrals"), nb::arg("threads"), array("theta"), array("x"),
          array("context"), array("frame"), array("probe"), array("z"), array("cost"), array("log_det"), array("hjb"),
          array("d_z"), array("a_terminal"), array("d_cost"), array("d_log_det"), array("d_hjb"),
          array("d_x"), array("d_context"), array("d_theta"));
}

}  // namespace
}  // namespace pathline

NB_MODULE(_kernel, m) {
    using namespace pathline;
    choose(nullptr);
    m.doc() = "Rollouts of small potentials, norms of channels, filters of images; see the headers.";
    define<float>(m);
    define<double>(m);
    define_norm<float>(m, "channel_norm_single");
    define_norm<double>(m, "channel_norm_twofold");
    define_filter<float>(m, "filter_single");
    define_filter<double>(m, "filter_twofold");
    m.def("isa", [] { return chosen->name; }, "The instruction set in use.");
    m.def("use", &choose, "Use another instruction set: for tests.");
    m.def("isas", [] {
        nb::list names;
        for (const Isa &isa : isas)
            if (isa.runs()) names.append(isa.name);
        return names;
    });
}
