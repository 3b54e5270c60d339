// A stack that can be left and come back to. Sanitizers are told of each switch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace shim {

class Fibre {
   public:
    // A stack of its own, with a page below it that nobody may touch.
    Fibre();
    Fibre(const Fibre&) = delete;

    // Begin anew with `entry`, which never returns; what was on the stack is forgotten.
    void start(void (*entry)());
    // From the thread that schedules: run until `leave`.
    void enter();
    // Back to where `enter` was called. `last`: this stack is not needed any more.
    void leave(bool last);

    // Whether this is on the stack.
    bool holds(const void* address) const;

   private:
    void* stack;
    void* top = nullptr;
    void* fake = nullptr;
    void* race = nullptr;
};

}  // namespace shim
