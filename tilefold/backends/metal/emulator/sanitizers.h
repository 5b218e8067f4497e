// What the runtime tells the sanitizer that it is linked with; without one, the functions do
// nothing but fill threadgroup memory with ones: NaN in every floating type.
#pragma once
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

[[noreturn]] void report_access(const void* address, const void* pc, int write, int bytes);

namespace sanitizer {

inline char* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return static_cast<char*>(memory);
}

typedef void* Fiber;
constexpr bool fresh_stacks = false;
inline char* stack(size_t bytes) { return map(bytes); }
inline Fiber begin(char*, size_t) { return nullptr; }
inline Fiber create() { return nullptr; }
inline void destroy(Fiber) {}
inline void change(Fiber) {}
inline void ignore() {}
inline void heed() {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void begin_group(char* section, size_t bytes) { memset(section, 0xFF, bytes); }
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline void written(const void*, size_t) {}
inline long unwritten(const void*, size_t) { return -1; }
inline float as_written_as(float, float, float result) { return result; }

}  // namespace sanitizer
