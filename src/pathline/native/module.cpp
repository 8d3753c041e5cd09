// The Python face of the kernels: picks the instruction set, shares tiles among threads.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include "kernel.hpp"

namespace nb = nanobind;

namespace pathline {
namespace {

struct Isa {
    const char *name;
    const Kernel<float> &single;
    const Kernel<double> &twofold;
    bool (*runs)();
};

const Isa isas[] = {
#ifdef PATHLINE_HAS_X86_VARIANTS
    {"avx512", avx512::single, avx512::twofold,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi2");
     }},
    {"avx2", avx2::single, avx2::twofold,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
     }},
#endif
    {"baseline", baseline::single, baseline::twofold, [] { return true; }},
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
    std::vector<std::thread> others;
    for (std::ptrdiff_t thread = 1; thread < count; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread &other : others) other.join();
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
    m.doc() = "Rollouts of small potentials and their gradients; see kernel.hpp.";
    define<float>(m);
    define<double>(m);
    m.def("isa", [] { return chosen->name; }, "The instruction set in use.");
    m.def("use", &choose, "Use another instruction set: for tests.");
    m.def("isas", [] {
        nb::list names;
        for (const Isa &isa : isas)
            if (isa.runs()) names.append(isa.name);
        return names;
    });
}
