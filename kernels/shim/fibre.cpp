#include "fibre.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if defined(SHIM_ADDRESSES)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SHIM_RACES)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace shim {

namespace {

constexpr size_t PAGE = 4096;
#if defined(SHIM_ADDRESSES) || defined(SHIM_RACES)
constexpr size_t STACK = 512 * 1024;
#else
constexpr size_t STACK = 128 * 1024;
#endif

// The thread that schedules. In `.data`, because `.bss` is the kernels' shared memory (runtime.cpp).
struct Main {
    void* top;
    void* fake;
    const void* stack;
    size_t size;
    void* race;
};
Main scheduler __attribute__((section(".data"))) = {};

}  // namespace

#if defined(__x86_64__)

// What a call must keep, on the stack that is left; then the other stack, and what it kept.
extern "C" void shim_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".type shim_switch, @function\n"
    "shim_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size shim_switch, . - shim_switch\n");

static void* prepare(void* stack, void*, void (*entry)()) {
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + STACK);
    // As if `entry` had been called: no return address, then six registers.
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    return top;
}

#else

// Slower by a system call.
static void shim_switch(void** from, void* to) {
    if (*from == nullptr) *from = std::calloc(1, sizeof(ucontext_t));
    swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

static void* prepare(void* stack, void* before, void (*entry)()) {
    auto* context = static_cast<ucontext_t*>(before ? before : std::calloc(1, sizeof(ucontext_t)));
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

#endif

Fibre::Fibre() {
    void* all = mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(all, PAGE, PROT_NONE) != 0) {
        std::perror("a stack for the SIMT shim");
        std::abort();
    }
    stack = static_cast<char*>(all) + PAGE;
#if defined(SHIM_RACES)
    race = __tsan_create_fiber(0);
#endif
}

static void (*entry_of_new)() __attribute__((section(".data"))) = nullptr;

// The first thing on a new stack.
static void begin() {
#if defined(SHIM_ADDRESSES)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.size);
#endif
    entry_of_new();
    std::abort();
}

void Fibre::start(void (*entry)()) {
#if defined(SHIM_ADDRESSES)
    __asan_unpoison_memory_region(stack, STACK);
    fake = nullptr;
#endif
    entry_of_new = entry;
    top = prepare(stack, top, begin);
}

bool Fibre::holds(const void* address) const {
    return address >= stack && address < static_cast<const char*>(stack) + STACK;
}

void Fibre::enter() {
#if defined(SHIM_ADDRESSES)
    __sanitizer_start_switch_fiber(&scheduler.fake, stack, STACK);
#endif
#if defined(SHIM_RACES)
    scheduler.race = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(race, 1);
#endif
    shim_switch(&scheduler.top, top);
#if defined(SHIM_ADDRESSES)
    __sanitizer_finish_switch_fiber(scheduler.fake, nullptr, nullptr);
#endif
}

void Fibre::leave(bool last) {
#if defined(SHIM_ADDRESSES)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler.stack, scheduler.size);
#else
    (void)last;
#endif
#if defined(SHIM_RACES)
    __tsan_switch_to_fiber(scheduler.race, 1);
#endif
    shim_switch(&top, scheduler.top);
#if defined(SHIM_ADDRESSES)
    __sanitizer_finish_switch_fiber(fake, &scheduler.stack, &scheduler.size);
#endif
}

}  // namespace shim
