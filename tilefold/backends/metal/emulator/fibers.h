// Fibers: a stack each, and a switch between them.
#pragma once
#include <sys/mman.h>

namespace fibers {

#if defined(__x86_64__)
// The registers that a call must preserve go to the stack that is left; the rest the compiler has
// saved already. About 2 ns, where swapcontext asks the kernel for the signal mask each time.
extern "C" void tilefold_switch(void** from, void* to);
asm(R"(
    .text
    .globl tilefold_switch
    .type tilefold_switch, @function
tilefold_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size tilefold_switch, .-tilefold_switch
)");

struct Fiber {
    void* stack_pointer;

    void start(char* stack, size_t size, void (*body)()) {
        void** top = reinterpret_cast<void**>(stack + size);
        *--top = nullptr;  // where the body would return to; with it the stack is aligned
        *--top = reinterpret_cast<void*>(body);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer = top;
    }
    static void go(Fiber& from, Fiber& to) {
        tilefold_switch(&from.stack_pointer, to.stack_pointer);
    }
};
#else
#include <ucontext.h>

struct Fiber {
    ucontext_t context;

    void start(char* stack, size_t size, void (*body)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, body, 0);
    }
    static void go(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
};
#endif

}  // namespace fibers
