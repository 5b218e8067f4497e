// What the runtime tells the sanitizer that it is linked with. Each part of this file serves one
// way of checking; without a sanitizer the functions do nothing but fill threadgroup memory with
// ones: NaN in every floating type.
#pragma once
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

[[noreturn]] void report_access(const void* address, const void* pc, int write, int bytes);
[[noreturn]] void report_race(const void* address, const void* pc, const void* other_pc,
                              const char* what);
[[noreturn]] void report_unwritten();

#if defined(TILEFOLD_ADDRESS)
#include <sanitizer/asan_interface.h>
#elif defined(TILEFOLD_MEMORY)
#include <sanitizer/msan_interface.h>
#elif defined(TILEFOLD_THREAD)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_java_init(unsigned long begin, unsigned long size);
void __tsan_java_alloc(unsigned long begin, unsigned long size);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
int __tsan_get_report_data(void* report, const char** description, int* count, int* stacks,
                           int* accesses, int* places, int* mutexes, int* threads,
                           int* unique_threads, void** trace, unsigned long size);
int __tsan_get_report_mop(void* report, unsigned long n, int* thread, void** address, int* size,
                          int* write, int* atomic, void** trace, unsigned long trace_size);
int __tsan_get_report_thread(void* report, unsigned long n, int* thread, unsigned long* os_id,
                             int* running, const char** name, int* parent, void** trace,
                             unsigned long trace_size);
}
#endif

namespace sanitizer {

inline char* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return static_cast<char*>(memory);
}

typedef void* Fiber;

// --- Races: a fiber is a thread to ThreadSanitizer, and changing fibers orders nothing.

#if defined(TILEFOLD_THREAD)
constexpr bool fresh_stacks = true;
// Stacks of one group's threads must not be another's: those threads are not ordered, so a stack
// that is used again would be a race. The address space has room: 64 KiB for each thread.
inline char* stack(size_t bytes) {
    static char* left;
    static size_t free;
    if (free < bytes) {
        free = size_t(1) << 32;
        left = map(free);
    }
    free -= bytes;
    return left + free;
}
inline Fiber begin(char* section, size_t bytes) {
    if (bytes) __tsan_java_init(reinterpret_cast<unsigned long>(section), (bytes + 7) / 8 * 8);
    return __tsan_get_current_fiber();
}
inline Fiber create(const char* name) {
    Fiber fiber = __tsan_create_fiber(0);
    __tsan_set_fiber_name(fiber, name);
    return fiber;
}
inline void destroy(Fiber fiber) { __tsan_destroy_fiber(fiber); }
inline void change(Fiber fiber) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
inline void ignore() { __tsan_ignore_thread_begin(); }
inline void heed() { __tsan_ignore_thread_end(); }
inline void release(void* order) { __tsan_release(order); }
inline void acquire(void* order) { __tsan_acquire(order); }
#else
constexpr bool fresh_stacks = false;
inline char* stack(size_t bytes) { return map(bytes); }
#if defined(TILEFOLD_MEMORY)
inline Fiber begin(char*, size_t) {
    __msan_set_death_callback([] { report_unwritten(); });
    return nullptr;
}
#else
inline Fiber begin(char*, size_t) { return nullptr; }
#endif
inline Fiber create(const char*) { return nullptr; }
inline void destroy(Fiber) {}
inline void change(Fiber) {}
inline void ignore() {}
inline void heed() {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

// --- The start of a threadgroup: its memory is as if nobody had ever used it.

inline void poison(char* section, size_t bytes) {
    // Volatile: stores, not a call of memset, which AddressSanitizer would check.
    for (size_t i = 0; i < bytes; ++i) const_cast<volatile char*>(section)[i] = -1;
}

#if defined(TILEFOLD_MEMORY)
inline void begin_group(char* section, size_t bytes) {
    poison(section, bytes);
    __msan_allocated_memory(section, bytes);
}
#elif defined(TILEFOLD_THREAD)
inline void begin_group(char* section, size_t bytes) {
    poison(section, bytes);
    // The only function that makes ThreadSanitizer forget who used a piece of memory.
    if (bytes) __tsan_java_alloc(reinterpret_cast<unsigned long>(section), (bytes + 7) / 8 * 8);
}
#else
inline void begin_group(char* section, size_t bytes) { poison(section, bytes); }
#endif

// --- Bounds, to the byte: guard pages leave up to a page before a buffer unguarded.

#if defined(TILEFOLD_ADDRESS)
inline void forbid(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void allow(const void* memory, size_t bytes) {
    __asan_unpoison_memory_region(memory, bytes);
}
// What the runtime reads and writes for a kernel: its own accesses are not checked.
inline void touch(const void* memory, size_t bytes, const void* pc, int write) {
    if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(memory), bytes))
        report_access(bad, pc, write, 1);
}
#else
inline void touch(const void*, size_t, const void*, int) {}
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

// --- Values that come from memory that nobody wrote.

#if defined(TILEFOLD_MEMORY)
inline long unwritten(const void* memory, size_t bytes) {
    return __msan_test_shadow(memory, bytes);
}
inline float as_written_as(float x, float y, float result) {
    if (__msan_test_shadow(&x, sizeof x) >= 0 || __msan_test_shadow(&y, sizeof y) >= 0)
        __msan_poison(&result, sizeof result);
    return result;
}
#else
inline long unwritten(const void*, size_t) { return -1; }
inline float as_written_as(float, float, float result) { return result; }
#endif

}  // namespace sanitizer

// --- What sanitizers say when they find something.

#if defined(TILEFOLD_ADDRESS)
extern "C" void __asan_on_error() {
    report_access(__asan_get_report_address(), __asan_get_report_pc(),
                  __asan_get_report_access_type(), int(__asan_get_report_access_size()));
}
#elif defined(TILEFOLD_THREAD)
extern "C" void __tsan_on_report(void* report) {
    struct Access {
        int thread, size, write, atomic;
        void *address, *trace[16];
        const char* name;
    } access[2] = {};
    const char* description;
    int count, stacks, accesses, places, mutexes, threads, unique_threads;
    void* trace[1];
    __tsan_get_report_data(report, &description, &count, &stacks, &accesses, &places, &mutexes,
                           &threads, &unique_threads, trace, 1);
    for (int n = 0; n < 2 && n < accesses; ++n) {
        Access& a = access[n];
        __tsan_get_report_mop(report, n, &a.thread, &a.address, &a.size, &a.write, &a.atomic,
                              a.trace, 16);
        for (int i = 0; i < threads; ++i) {
            int thread, running, parent;
            unsigned long os_id;
            const char* name;
            if (__tsan_get_report_thread(report, i, &thread, &os_id, &running, &name, &parent,
                                         trace, 1) && thread == a.thread)
                a.name = name;
        }
    }
    char what[256];
    snprintf(what, sizeof what, "%s of %s and %s of %s", access[0].write ? "write" : "read",
             access[0].name ? access[0].name : "the host", access[1].write ? "write" : "read",
             access[1].name ? access[1].name : "the host");
    report_race(access[0].address, access[0].trace[0], access[1].trace[0], what);
}
#endif
