// What a kernel compiled as host C++ sees of the machine that runs it (runtime.cpp): threads that meet, copies on their
// way, and a way to say what is wrong.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace shim {

// Where a thread waits, and at what.
struct Site {
    const char* what;
    const char* file;
    int line;
};
// As the last parameter of what a kernel calls: the caller's own place.
#define SHIM_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Ends the launch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// This thread's number in its warp.
uint32_t lane();

// Waits for all lanes of `mask`, which must come to the same place. The last to come runs `all` over what each of them
// brought (null where a lane is not of the mask).
void meet(const Site& site, uint32_t mask, void* mine, void (*all)(void* const* brought, uint32_t mask));

// Waits for all threads of the block; whether all of them brought `true`.
bool meet_block(const Site& site, bool mine);

// Copies of a thread, by groups: what is on its way is garbage until it is waited for.
void copy(void* to, const void* from, const Site& site);
void commit();
void wait(int but_last);

// Copies of the engine, with a barrier that counts their bytes.
void barrier_init(uint64_t* barrier, const Site& site);
void barrier_expect(uint64_t* barrier, uint32_t len, const Site& site);
void copy_bulk(void* to, const void* from, uint32_t len, uint64_t* barrier, const Site& site);
void barrier_wait(uint64_t* barrier, uint32_t parity, const Site& site);

// A kernel as it is launched: by the addresses of its arguments.
using Kernel = void (*)(void* const* args);

template <auto F>
struct Launch;
template <class... A, void (*F)(A...)>
struct Launch<F> {
    static void run(void* const* args) { run(args, std::index_sequence_for<A...>()); }
    template <std::size_t... I>
    static void run(void* const* args, std::index_sequence<I...>) {
        F(*static_cast<const A*>(args[I])...);
    }
};

}  // namespace shim

// The name under which a kernel is found.
#define SHIM_KERNEL(name) \
    extern "C" void shim_##name(void* const* args) { shim::Launch<name>::run(args); }
