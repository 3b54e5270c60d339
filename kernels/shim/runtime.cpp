// Runs a kernel over a grid: one block after the other, the threads of a block as fibres on one thread of the host.
//
// Which warp goes on, for how long, in which order its lanes do, which block is next, and when a copy arrives is drawn
// from a seed: what depends on it is a race, and shows as a wrong answer. What waits for ever is said with its place.
#include <signal.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"
#include "fibre.h"

#if defined(SHIM_ADDRESSES)
#include <sanitizer/asan_interface.h>
#endif
#if defined(SHIM_RACES)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

// Everything that the runtime itself keeps must be out of `.bss`.
#define SHIM_STATE __attribute__((section(".data")))

Dim3 threadIdx SHIM_STATE, blockIdx SHIM_STATE, blockDim SHIM_STATE, gridDim SHIM_STATE;

// `extern __shared__ uint8_t shared[]`: as much as a block of any device can have.
constexpr uint32_t MOST_SHARED = 227 * 1024;
alignas(1024) uint8_t shared[MOST_SHARED + 1024];

// The linker's: static shared memory of all kernels lies between them.
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));

namespace shim {
namespace {

constexpr int LANES = 32;
constexpr int MOST_THREADS = 1024;

// What happens before, for the race detector.
void publish(void* of) {
#if defined(SHIM_RACES)
    __tsan_release(of);
#endif
    (void)of;
}
void observe(void* of) {
#if defined(SHIM_RACES)
    __tsan_acquire(of);
#endif
    (void)of;
}

struct Random {
    uint64_t state;
    uint32_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return static_cast<uint32_t>(state * 0x2545f4914f6cdd1dull >> 32);
    }
    uint32_t below(uint32_t n) { return static_cast<uint64_t>(next()) * n >> 32; }
};

struct Copy {
    uint8_t* to;
    const uint8_t* from;
    uint32_t len;
    uint64_t* barrier;
};

struct Thread {
    Fibre fibre;
    Dim3 index;
    uint32_t lane;
    struct Warp* warp;
    bool ended;
    Site at;
    // The answer of the last barrier of the block.
    bool all;
    // Groups of copies, the last one open.
    std::vector<std::vector<Copy>> copies;
};

// Lanes of one mask on their way to one place.
struct Meeting {
    uint32_t mask, here;
    // For the race detector: who comes, and who goes on, at every other meeting.
    char come[2], go[2];
    bool odd;
    Site site;
    void* brought[LANES];
};

struct Warp {
    uint32_t ready;
    // By the lowest lane of the mask.
    Meeting meetings[LANES];
};

struct State {
    std::unique_ptr<Thread> threads[MOST_THREADS];
    Warp warps[MOST_THREADS / LANES];
    int count, live, waiting;
    Site barrier;
    bool all;
    char come[2], go[2];
    bool odd;
    // How often a thread looked for bytes since anything happened.
    int idle;
    std::vector<Copy> engine;
    Random random;
    uint8_t garbage;
    Kernel kernel;
    void* const* args;
    uint32_t shared_len;
    bool failed;
    char error[2048];
};
State* state SHIM_STATE = nullptr;
// The thread that runs; none while blocks are set up.
Thread* current SHIM_STATE = nullptr;

const char* name_of(const char* file) {
    const char* last = file;
    for (const char* c = file; *c; ++c)
        if (*c == '/') last = c + 1;
    return last;
}

// Until the scheduler takes this thread up again.
void pause(bool last = false) { current->fibre.leave(last); }

void happened() { state->idle = 0; }

// ---- copies

struct Barrier {
    static constexpr uint8_t MAGIC = 0xb5;
    uint8_t magic, parity;
    uint16_t arrivals;
    int32_t bytes;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

Barrier load(const uint64_t* at, const Site& site) {
    const auto barrier = shim_bits<Barrier>(*at);
    if (barrier.magic != Barrier::MAGIC) fail("%s:%d: %s of what is no barrier", site.file, site.line, site.what);
    return barrier;
}

void store(uint64_t* at, Barrier barrier) {
    if (barrier.arrivals == 0 && barrier.bytes == 0) {
        barrier.parity ^= 1;
        barrier.arrivals = 1;
    }
    *at = shim_bits<uint64_t>(barrier);
}

void put(uint8_t* to, const uint8_t* from, uint32_t len) {
    for (uint32_t i = 0; i < len; ++i) to[i] = from[i];
}

void deliver(const Copy& copy) {
    happened();
    put(copy.to, copy.from, copy.len);
    if (copy.barrier == nullptr) return;
    Barrier barrier = load(copy.barrier, {"a copy's arrival", "engine", 0});
    barrier.bytes -= static_cast<int32_t>(copy.len);
    store(copy.barrier, barrier);
}

void deliver_any() {
    auto& engine = state->engine;
    const size_t which = state->random.below(engine.size());
    const Copy copy = engine[which];
    engine.erase(engine.begin() + which);
    deliver(copy);
}

// From here on until it arrives, what is there is garbage.
Copy depart(void* to, const void* from, uint32_t len, uint64_t* barrier, const Site& site) {
    auto* begin = static_cast<uint8_t*>(to);
    const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | len;
    if (bits % 16 != 0) fail("%s:%d: %s not at a multiple of 16", name_of(site.file), site.line, site.what);
    if (begin < shared || begin + len > shared + state->shared_len)
        fail("%s:%d: %s outside of the block's shared memory", name_of(site.file), site.line, site.what);
    for (uint32_t i = 0; i < len; ++i) begin[i] = state->garbage;
    return {begin, static_cast<const uint8_t*>(from), len, barrier};
}

// ---- what is wrong

// "threads 0-31, 64 have ended; threads 32-63 wait at __syncthreads (seal.cu:123)"
void describe(char* out, size_t size) {
    size_t used = 0;
    auto print = [&](const char* format, auto... of) {
        if (used < size) used += std::snprintf(out + used, size - used, format, of...);
    };
    auto same = [](const Thread& a, const Thread& b) {
        return a.ended == b.ended && (a.ended || (a.at.what == b.at.what && a.at.line == b.at.line));
    };
    std::vector<bool> told(state->count);
    for (int i = 0; i < state->count; ++i) {
        if (told[i]) continue;
        const Thread& first = *state->threads[i];
        print("%sthreads", used ? "; " : "");
        for (int j = i; j < state->count; ++j) {
            if (told[j] || !same(first, *state->threads[j])) continue;
            int end = j;
            while (end + 1 < state->count && same(first, *state->threads[end + 1])) told[++end] = true;
            print(end > j ? "%s %d-%d" : "%s %d", j > i ? "," : "", j, end);
            told[j] = true;
            j = end;
        }
        if (first.ended)
            print(" have ended");
        else
            print(" wait at %s (%s:%d)", first.at.what, name_of(first.at.file), first.at.line);
    }
}

void say(const char* format, va_list of) {
    if (state->failed) return;
    state->failed = true;
    int used = 0;
    if (current != nullptr)
        used = std::snprintf(state->error, sizeof state->error, "block (%u, %u, %u), thread %u: ", blockIdx.x,
                             blockIdx.y, blockIdx.z, threadIdx.x);
    else
        used = std::snprintf(state->error, sizeof state->error, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y,
                             blockIdx.z);
    std::vsnprintf(state->error + used, sizeof state->error - used, format, of);
}

// From the scheduler.
void note(const char* format, ...) {
    va_list of;
    va_start(of, format);
    current = nullptr;
    say(format, of);
    va_end(of);
}

// ---- a block

void run_thread() {
    // Begins after the block's begin, and ends before its end; not after another thread's end.
    observe(&state->kernel);
    state->kernel(state->args);
    Thread& mine = *current;
    for (const auto& group : mine.copies)
        if (!group.empty()) fail("ended with a copy on its way (cp.async)");
    mine.ended = true;
    --state->live;
    happened();
    publish(&state->live);
    pause(true);
}

// Each lane that can goes on until it waits, in an order of its own each time.
void run_warp(int warp) {
    Warp& of = state->warps[warp];
    const uint32_t start = state->random.next(), step = start >> 5 | 1, flip = start >> 10;
    for (uint32_t i = 0; i < LANES && !state->failed; ++i) {
        const uint32_t lane = ((start + i * step) ^ flip) % LANES;
        if (!(of.ready >> lane & 1)) continue;
        current = state->threads[warp * LANES + lane].get();
        threadIdx = current->index;
        current->fibre.enter();
        if (current->ended) of.ready &= ~(1u << lane);
    }
}

// All of it, also what a sanitizer guards.
__attribute__((no_sanitize("address"))) void fill(volatile char* from, volatile char* to, uint8_t with) {
#if defined(__x86_64__)
    size_t len = to - from;
    __asm__ volatile("rep stosb" : "+D"(from), "+c"(len) : "a"(with) : "memory");
#else
    for (; from < to; ++from) *from = static_cast<char>(with);
#endif
}

void run_block() {
    State& s = *state;
    s.garbage = s.random.next() & 1 ? 0xff : 0xcd;
    fill(__bss_start, _end, s.garbage);
    s.live = s.count = blockDim.x * blockDim.y * blockDim.z;
    s.waiting = s.idle = 0;
    s.engine.clear();
    const int warps = (s.count + LANES - 1) / LANES;
    for (int w = 0; w < warps; ++w) {
        const int lanes = std::min(LANES, s.count - w * LANES);
        s.warps[w].ready = lanes == LANES ? ~0u : (1u << lanes) - 1;
        for (auto& meeting : s.warps[w].meetings) meeting.here = 0;
    }
    for (int t = 0; t < s.count; ++t) {
        if (!s.threads[t]) s.threads[t] = std::make_unique<Thread>();
        Thread& thread = *s.threads[t];
        const uint32_t x = blockDim.x, y = blockDim.y;
        thread.index = {t % x, t / x % y, t / x / y};
        thread.lane = t % LANES;
        thread.warp = &s.warps[t / LANES];
        thread.ended = false;
        thread.at = {"its start", "", 0};
        thread.copies.assign(1, {});
        thread.fibre.start(run_thread);
    }
    publish(&s.kernel);
    while (s.live > 0 && !s.failed) {
        // Any warp that can go on, for as long as it can or for a while.
        int which = -1, seen = 0;
        for (int w = 0; w < warps; ++w)
            if (s.warps[w].ready != 0 && s.random.below(++seen) == 0) which = w;
        if (which < 0) {
            char where[1024];
            describe(where, sizeof where);
            note("nobody can go on: %s", where);
            break;
        }
        constexpr uint32_t LONG[4] = {1, 3, 17, 1000};
        uint32_t turns = LONG[s.random.below(4)];
        while (turns-- > 0 && s.warps[which].ready != 0 && !s.failed && s.idle == 0) run_warp(which);
        if (s.idle > 0) run_warp(which);
        if (s.idle > 100 * s.count) {
            char where[1024];
            describe(where, sizeof where);
            note("bytes are waited for that nobody sends: %s", where);
        }
    }
    observe(&s.live);
    current = nullptr;
    if (s.failed) return;
    if (!s.engine.empty()) note("the block ended with a copy on its way");
#if !defined(SHIM_ADDRESSES)
    for (uint32_t i = s.shared_len; i < s.shared_len + 1024 && i < sizeof shared; ++i)
        if (shared[i] != s.garbage) {
            note("byte %u of shared memory was written, of %u", i, s.shared_len);
            break;
        }
#endif
}

}  // namespace

void fail(const char* format, ...) {
    va_list of;
    va_start(of, format);
    say(format, of);
    va_end(of);
    for (;;) pause(true);
}

uint32_t lane() { return current->lane; }

void meet(const Site& site, uint32_t mask, void* mine, void (*all)(void* const* brought, uint32_t mask)) {
    const uint32_t l = current->lane;
    if (!(mask >> l & 1)) fail("%s (%s:%d): its mask leaves lane %u out", site.what, name_of(site.file), site.line, l);
    Warp& warp = *current->warp;
    Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
    if (meeting.here == 0) {
        meeting.mask = mask;
        meeting.site = site;
        std::fill(meeting.brought, meeting.brought + LANES, nullptr);
    } else if (meeting.mask != mask || meeting.site.what != site.what || meeting.site.line != site.line) {
        fail("lanes of a warp part: %08x wait at %s (%s:%d), lane %u at %s (%s:%d)", meeting.here, meeting.site.what,
             name_of(meeting.site.file), meeting.site.line, l, site.what, name_of(site.file), site.line);
    }
    current->at = site;
    meeting.brought[l] = mine;
    meeting.here |= 1u << l;
    const bool odd = meeting.odd;
    publish(&meeting.come[odd]);
    if (meeting.here != mask) {
        warp.ready &= ~(1u << l);
        pause();
    } else {
        observe(&meeting.come[odd]);
        meeting.here = 0;
        meeting.odd = !odd;
        all(meeting.brought, mask);
        warp.ready |= mask;
        happened();
        publish(&meeting.go[odd]);
        if (!state->engine.empty() && state->random.below(4) == 0) deliver_any();
    }
    observe(&meeting.go[odd]);
}

bool meet_block(const Site& site, bool mine) {
    State& s = *state;
    if (s.waiting == 0) {
        s.barrier = site;
        s.all = true;
    } else if (s.barrier.what != site.what || s.barrier.line != site.line) {
        fail("threads wait at different barriers: %d at %s (%s:%d), this one at %s (%s:%d)", s.waiting, s.barrier.what,
             name_of(s.barrier.file), s.barrier.line, site.what, name_of(site.file), site.line);
    }
    s.all = s.all && mine;
    current->at = site;
    const bool odd = s.odd;
    publish(&s.come[odd]);
    if (++s.waiting < s.count) {
        current->warp->ready &= ~(1u << current->lane);
        pause();
    } else {
        observe(&s.come[odd]);
        s.waiting = 0;
        s.odd = !odd;
        happened();
        for (int t = 0; t < s.count; ++t) {
            s.threads[t]->all = s.all;
            s.warps[t / LANES].ready |= 1u << t % LANES;
        }
        publish(&s.go[odd]);
    }
    observe(&s.go[odd]);
    return current->all;
}

void copy(void* to, const void* from, const Site& site) {
    const Copy copy = depart(to, from, 16, nullptr, site);
    // Some arrive at once.
    if (state->random.below(4) == 0)
        deliver(copy);
    else
        current->copies.back().push_back(copy);
}

void commit() { current->copies.emplace_back(); }

void wait(int but_last) {
    auto& copies = current->copies;
    // The last is open.
    while (static_cast<int>(copies.size()) - 1 > but_last) {
        for (const Copy& copy : copies.front()) deliver(copy);
        copies.erase(copies.begin());
    }
}

void barrier_init(uint64_t* at, const Site& site) {
    if (reinterpret_cast<uintptr_t>(at) % 8 != 0) fail("%s:%d: a barrier not at a multiple of 8", site.file, site.line);
    *at = shim_bits<uint64_t>(Barrier{Barrier::MAGIC, 0, 1, 0});
}

void barrier_expect(uint64_t* at, uint32_t len, const Site& site) {
    Barrier barrier = load(at, site);
    if (barrier.arrivals == 0) fail("%s:%d: a barrier's phase has its arrival already", name_of(site.file), site.line);
    barrier.arrivals -= 1;
    barrier.bytes += static_cast<int32_t>(len);
    store(at, barrier);
}

void copy_bulk(void* to, const void* from, uint32_t len, uint64_t* at, const Site& site) {
    load(at, site);
    state->engine.push_back(depart(to, from, len, at, site));
}

void barrier_wait(uint64_t* at, uint32_t parity, const Site& site) {
    current->at = site;
    while (load(at, site).parity == parity) {
        if (!state->engine.empty() && state->random.below(2) == 0) {
            deliver_any();
            continue;
        }
        ++state->idle;
        pause();
    }
}

}  // namespace shim

// What a host compiler finds to be wrong: an index beyond an array's end, by name of file and line.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};
extern "C" void __ubsan_handle_out_of_bounds(SourceLocation* at, uintptr_t index) {
    shim::fail("index %ld is outside of its array (%s:%u)", static_cast<long>(index), shim::name_of(at->file), at->line);
}

// A vector that is not where vectors lie.
struct Misaligned {
    SourceLocation at;
    const void* type;
    uint8_t log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(Misaligned* of, uintptr_t address) {
    shim::fail("%d bytes are read or written at an address %d above their multiple (%s:%u)", 1 << of->log_alignment,
               static_cast<int>(address & ((1u << of->log_alignment) - 1)), shim::name_of(of->at.file), of->at.line);
}

namespace shim {
namespace {

std::mutex running SHIM_STATE;

void run_grid(uint32_t shared_len, uint64_t seed) {
    State& s = *state;
    s.random.state = (seed + 1) * 0x9e3779b97f4a7c15ull | 1;
    s.shared_len = shared_len;
    if (blockDim.x * blockDim.y * blockDim.z > MOST_THREADS || shared_len > MOST_SHARED)
        return note("too many threads or too much shared memory for a block");
#if defined(SHIM_ADDRESSES)
    __asan_unpoison_memory_region(shared, sizeof shared);
    __asan_poison_memory_region(shared + (shared_len + 7) / 8 * 8, sizeof shared - (shared_len + 7) / 8 * 8);
#endif
    std::vector<uint32_t> order(gridDim.x * gridDim.y * gridDim.z);
    for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    for (uint32_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[s.random.below(i)]);
    for (uint32_t i : order) {
        blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
        run_block();
        if (s.failed) return;
    }
}

}  // namespace
}  // namespace shim

#if !defined(SHIM_ADDRESSES) && !defined(SHIM_RACES)
// An address where nothing is: a fault of the kernel, if it is on the stack of one of its threads.
namespace shim {
namespace {

struct sigaction before[2] SHIM_STATE;

void on_fault(int signal, siginfo_t* info, void* context) {
    const char here = 0;
    if (current != nullptr && current->fibre.holds(&here)) fail("nothing is at address %p", info->si_addr);
    const struct sigaction& theirs = before[signal == SIGBUS];
    if (theirs.sa_flags & SA_SIGINFO)
        theirs.sa_sigaction(signal, info, context);
    else
        sigaction(signal, &theirs, nullptr);
}

void watch_faults() {
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    // The handler is left by a switch, so that it must not hold the next one back.
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &ours, &before[0]);
    sigaction(SIGBUS, &ours, &before[1]);
}

}  // namespace
}  // namespace shim
#else
namespace shim {
static void watch_faults() {}
}  // namespace shim
#endif

// Runs `kernel` over a grid; whether nothing was wrong, and if something was, `message` says what.
extern "C" bool shim_launch(shim::Kernel kernel, void* const* args, const uint32_t* grid, const uint32_t* block,
                            uint32_t shared_len, uint64_t seed, char* message, size_t size) {
    using namespace shim;
    const std::lock_guard<std::mutex> alone(running);
    if (state == nullptr) {
        state = new State();
        watch_faults();
    }
    state->kernel = kernel;
    state->args = args;
    state->failed = false;
    current = nullptr;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    blockIdx = {0, 0, 0};
    run_grid(shared_len, seed);
    if (state->failed) std::snprintf(message, size, "%s", state->error);
    return !state->failed;
}
