// Runs one launch of a compiled kernel: `runner KERNEL.so LAUNCH ENTRY`.
//
// LAUNCH is a file that launch.py wrote: 64-bit words, then the bytes of all memory. Each region of
// memory is copied between two stretches of pages that no one may touch, flush against the second;
// after the run all are copied back. Threadgroups run one after the other. Their threads are
// fibers that wait for each other in operations of simdgroups and in barriers (lanes.h). A fault is
// one line on standard output, `fault` and what is known of it as key=value, and status 3.
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#include "fibers.h"
#include "include/lanes.h"
#include "include/scalars.h"
#include "sanitizers.h"

using namespace emulator;
using fibers::Fiber;

namespace {

constexpr int lanes_of_simdgroup = 32;
constexpr int most_threads = 1024;
constexpr size_t stack_bytes = sanitizer::fresh_stacks ? 64 << 10 : 256 << 10;
constexpr size_t stack_guard_bytes = 4096;
constexpr size_t guard_bytes = 1 << 20;

typedef void (*Entry)(void* const* buffers, const Position* position);

enum class State { ready, waiting, at_barrier, ended };

struct Lane {
    Fiber fiber;
    char* stack;
    Position position;
    State state;
    void* parcel;
    sanitizer::Fiber identity;
    int line;  // of the last operation that it reached
};

// Where the first of those that wait has arrived: the others must arrive there, too.
struct Meeting {
    const char* operation;
    int line;
    int arrived;
};

struct Simdgroup {
    int first, size, ended, at_barrier, resume;
    Meeting meeting;
};

struct Region {
    char* memory;
    char* before;  // from here to `memory` nothing may be written
    unsigned long size;
};

struct Header {
    unsigned long grid[3], group[3], regions, arguments, section_offset, section_bytes;
    unsigned long counts[Count::counts];
};

Header* header;
Region* regions;
void** buffers;
Entry entry;
char* section;
void* library_base;

Lane lanes[most_threads];
Simdgroup simdgroups[most_threads / lanes_of_simdgroup];
int thread_count, simdgroup_count, simdgroups_ended;
Meeting barrier;

// Their addresses stand for the order that barriers make: that of the threadgroup, then of each
// simdgroup. Each threadgroup has its own and none is freed, since what one threadgroup did must
// not seem to come before what the next one does.
char* marks;

Lane* current;
Fiber main_fiber;
sanitizer::Fiber main_identity;
void* parcels[most_threads];
int parcel_count;

Simdgroup& simdgroup_of(const Lane* lane) { return simdgroups[lane->position.simdgroup]; }

// Says what went wrong, and ends the process: nothing after a fault means anything. Without
// memory from the heap: it may be called in the handler of a signal.
[[noreturn]] void fault(const char* kind, int line, const char* form, ...) {
    static char said[1024];
    const int most = sizeof said - 1;
    int used = snprintf(said, most, "fault kind=%s", kind);
    if (line) used += snprintf(said + used, most - used, " line=%d", line);
    if (current) {
        const Position& p = current->position;
        used += snprintf(said + used, most - used, " lane=%u simdgroup=%u group=%u,%u,%u last=%d",
                         p.lane, p.simdgroup, p.group[0], p.group[1], p.group[2], current->line);
    }
    used += snprintf(said + used, most - used, " text ");
    va_list words;
    va_start(words, form);
    used += vsnprintf(said + used, most - used, form, words);
    va_end(words);
    if (used > most - 1) used = most - 1;
    said[used] = '\n';
    if (write(STDOUT_FILENO, said, used + 1) < 0) _exit(4);
    _exit(3);
}

void go(Lane& to) {
    Lane& from = *current;
    current = &to;
    sanitizer::change(to.identity);
    Fiber::go(from.fiber, to.fiber);
}

// Lanes in which `state` holds, such as "0-15, 20", for messages.
const char* named(const Simdgroup& simdgroup, State state) {
    static char text[256];
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < simdgroup.size; ++i) {
        if (lanes[simdgroup.first + i].state != state) continue;
        int last = i;
        while (last + 1 < simdgroup.size && lanes[simdgroup.first + last + 1].state == state)
            ++last;
        used += snprintf(text + used, sizeof text - used, last > i ? "%s%d-%d" : "%s%d",
                         used ? ", " : "", i, last);
        i = last;
        if (used >= sizeof text) break;
    }
    return text;
}

[[noreturn]] void alone(const Meeting& meeting, const Lane& lane, const char* what, int line) {
    const Simdgroup& simdgroup = simdgroup_of(&lane);
    char where[96];
    if (line) snprintf(where, sizeof where, "%s in line %d", what, line);
    else snprintf(where, sizeof where, "%s", what);
    fault("divergence", meeting.line,
          "%s is reached by a part of simdgroup %u only: lanes %s wait there, lane %u %s",
          meeting.operation, lane.position.simdgroup, named(simdgroup, State::waiting),
          lane.position.lane, where);
}

[[noreturn]] void apart(const Meeting& meeting, const Lane& lane, const char* what, int line) {
    char where[96];
    if (line) snprintf(where, sizeof where, "%s in line %d", what, line);
    else snprintf(where, sizeof where, "%s", what);
    const Simdgroup& simdgroup = simdgroup_of(&lane);
    const char* waiting = named(simdgroup, State::at_barrier);
    fault("barrier", meeting.line,
          "%s is reached by a part of the threadgroup only: %d threads wait there (lanes %s of this"
          " simdgroup), lane %u of simdgroup %u %s",
          meeting.operation, meeting.arrived, *waiting ? waiting : "none", lane.position.lane,
          lane.position.simdgroup, where);
}

bool same(const Meeting& meeting, const char* operation, int line) {
    return meeting.line == line &&
           (meeting.operation == operation || strcmp(meeting.operation, operation) == 0);
}

// The simdgroup after this one that still has threads to run; this one itself if it is the last.
Simdgroup& next(const Simdgroup& simdgroup) {
    int i = &simdgroup - simdgroups;
    do i = (i + 1) % simdgroup_count;
    while (simdgroups[i].ended == simdgroups[i].size);
    return simdgroups[i];
}

Lane& successor(const Lane* lane) {
    const Simdgroup& simdgroup = simdgroup_of(lane);
    const int i = lane - lanes - simdgroup.first + 1;
    return lanes[simdgroup.first + (i == simdgroup.size ? 0 : i)];
}

bool arrive_simdgroup(const char* operation, int line) {
    Lane* lane = current;
    Simdgroup& simdgroup = simdgroup_of(lane);
    Meeting& meeting = simdgroup.meeting;
    lane->line = line;
    if (meeting.arrived == 0) {
        if (simdgroup.size < lanes_of_simdgroup)
            fault("divergence", line, "%s in a simdgroup of only %d threads", operation,
                  simdgroup.size);
        meeting = {operation, line, 0};
    } else if (!same(meeting, operation, line)) {
        alone(meeting, *lane, operation, line);
    }
    lane->state = State::waiting;
    if (simdgroup.at_barrier) apart(barrier, *lane, operation, line);
    if (simdgroup.ended) alone(meeting, successor(lane), "has ended", 0);
    if (++meeting.arrived == simdgroup.size) {
        meeting.arrived = 0;
        for (int i = 0; i < simdgroup.size; ++i) lanes[simdgroup.first + i].state = State::ready;
        parcel_count = simdgroup.size;
        for (int i = 0; i < simdgroup.size; ++i) parcels[i] = lanes[simdgroup.first + i].parcel;
        return true;
    }
    go(successor(lane));
    return false;
}

bool arrive_threadgroup(const char* operation, int line) {
    Lane* lane = current;
    Simdgroup& simdgroup = simdgroup_of(lane);
    lane->line = line;
    if (barrier.arrived == 0) barrier = {operation, line, 0};
    else if (!same(barrier, operation, line)) apart(barrier, *lane, operation, line);
    if (simdgroup.meeting.arrived) alone(simdgroup.meeting, *lane, operation, line);
    lane->state = State::at_barrier;
    ++barrier.arrived;
    for (int i = 0; i < thread_count && simdgroups_ended + simdgroup.ended; ++i)
        if (lanes[i].state == State::ended) apart(barrier, lanes[i], "has ended", 0);
    if (barrier.arrived == thread_count) {
        barrier.arrived = 0;
        for (int i = 0; i < simdgroup_count; ++i) simdgroups[i].at_barrier = 0;
        for (int i = 0; i < thread_count; ++i) {
            lanes[i].state = State::ready;
            parcels[i] = lanes[i].parcel;
        }
        parcel_count = thread_count;
        return true;
    }
    if (++simdgroup.at_barrier < simdgroup.size) {
        go(successor(lane));
    } else {
        // The first of these lanes to go on, when the barrier is over.
        simdgroup.resume = successor(lane).position.lane;
        Simdgroup& other = next(simdgroup);
        go(lanes[other.first + other.resume]);
    }
    return false;
}

// The body of every fiber.
void run_lane() {
    entry(buffers, &current->position);
    Lane* lane = current;
    Simdgroup& simdgroup = simdgroup_of(lane);
    lane->state = State::ended;
    if (simdgroup.meeting.arrived) alone(simdgroup.meeting, *lane, "has ended", 0);
    if (barrier.arrived) apart(barrier, *lane, "has ended", 0);
    if (++simdgroup.ended < simdgroup.size) go(successor(lane));
    simdgroup.resume = 0;
    if (++simdgroups_ended < simdgroup_count) {
        Simdgroup& other = next(simdgroup);
        go(lanes[other.first + other.resume]);
    }
    sanitizer::change(main_identity);
    Fiber::go(lane->fiber, main_fiber);
    abort();
}

void set(unsigned (&to)[3], unsigned x, unsigned y, unsigned z) {
    to[0] = x;
    to[1] = y;
    to[2] = z;
}

unsigned ceiling(unsigned long a, unsigned long b) { return (a + b - 1) / b; }

char* stack_of(int thread) {
    static char* stacks[most_threads];
    if (sanitizer::fresh_stacks) {
        stacks[thread] = sanitizer::stack(stack_bytes);
    } else if (!stacks[thread]) {
        char* memory = sanitizer::stack(stack_bytes + stack_guard_bytes);
        mprotect(memory, stack_guard_bytes, PROT_NONE);
        stacks[thread] = memory + stack_guard_bytes;
    }
    return stacks[thread];
}

void run_group(unsigned x, unsigned y, unsigned z) {
    marks = static_cast<char*>(malloc(1 + sizeof simdgroups / sizeof *simdgroups));
    sanitizer::begin_group(section, header->section_bytes);
    const unsigned at[3] = {x, y, z};
    unsigned size[3];
    for (int i = 0; i < 3; ++i) {
        const unsigned long left = header->grid[i] - at[i] * header->group[i];
        size[i] = left < header->group[i] ? left : header->group[i];
    }
    thread_count = size[0] * size[1] * size[2];
    simdgroup_count = ceiling(thread_count, lanes_of_simdgroup);
    simdgroups_ended = 0;
    barrier = {};
    for (int i = 0; i < simdgroup_count; ++i) {
        const int first = i * lanes_of_simdgroup, left = thread_count - first;
        simdgroups[i] = {first, left < lanes_of_simdgroup ? left : lanes_of_simdgroup, 0, 0, 0, {}};
    }
    for (int i = 0; i < thread_count; ++i) {
        Lane& lane = lanes[i];
        Position& p = lane.position;
        set(p.group, x, y, z);
        set(p.inside, i % size[0], i / size[0] % size[1], i / size[0] / size[1]);
        for (int n = 0; n < 3; ++n) {
            p.place[n] = at[n] * header->group[n] + p.inside[n];
            p.groups[n] = ceiling(header->grid[n], header->group[n]);
            p.size[n] = size[n];
            p.threads[n] = header->grid[n];
            p.full_size[n] = header->group[n];
        }
        p.index = i;
        p.lane = i % lanes_of_simdgroup;
        p.simdgroup = i / lanes_of_simdgroup;
        p.simdgroups = simdgroup_count;
        lane.state = State::ready;
        char name[64];
        snprintf(name, sizeof name, "lane %u of simdgroup %u in threadgroup (%u, %u, %u)", p.lane,
                 p.simdgroup, x, y, z);
        lane.identity = sanitizer::create(name);
        lane.line = 0;
        lane.stack = stack_of(i);
        lane.fiber.start(lane.stack, stack_bytes, run_lane);
    }
    current = &lanes[0];
    sanitizer::change(lanes[0].identity);
    Fiber::go(main_fiber, lanes[0].fiber);
    current = nullptr;
    for (int i = 0; i < thread_count; ++i) sanitizer::destroy(lanes[i].identity);
}

// Where an address lies, as key=value for launch.py.
const char* where(const void* address) {
    static char text[96];
    const char* at = static_cast<const char*>(address);
    for (unsigned long i = 0; i < header->regions; ++i) {
        const Region& r = regions[i];
        if (at < r.before - guard_bytes || at >= r.memory + r.size + guard_bytes) continue;
        snprintf(text, sizeof text, "region=%lu offset=%ld", i, long(at - r.memory));
        return text;
    }
    for (int i = 0; i < thread_count; ++i) {
        const char* stack = lanes[i].stack;
        if (at < stack - stack_guard_bytes || at >= stack + stack_bytes) continue;
        snprintf(text, sizeof text, "variable=%d", at >= stack);
        return text;
    }
    if (at >= section - stack_guard_bytes && at < section + header->section_bytes + 4096)
        snprintf(text, sizeof text, "section=%ld", long(at - section));
    else snprintf(text, sizeof text, "address=%p", address);
    return text;
}

// An address in the kernel, from its start; 0 if it is not in the kernel.
unsigned long from_start(const void* pc) {
    Dl_info info;
    const bool known = pc && dladdr(pc, &info) && info.dli_fbase == library_base;
    return known ? (const char*)pc - (const char*)library_base : 0;
}

}  // namespace

void report_access(const void* address, const void* pc, int write, int bytes) {
    fault(write ? "out-of-bounds-write" : "out-of-bounds-read", 0, "pc=%lx bytes=%d %s",
          from_start(pc), bytes, where(address));
}

void report_race(const void* address, const void* pc, const void* other_pc, const char* what) {
    fault("race", 0, "pc=%lx other=%lx %s what=%s", from_start(pc), from_start(other_pc),
          where(address), what);
}

void report_unwritten() {
    fault("unwritten", 0, "a branch or an address depends on it");
}

namespace {

void on_signal(int signal, siginfo_t* info, void* context) {
    const ucontext_t* registers = static_cast<ucontext_t*>(context);
    const void* pc = nullptr;
    int write = 0;
#if defined(__x86_64__)
    pc = reinterpret_cast<void*>(registers->uc_mcontext.gregs[REG_RIP]);
    write = registers->uc_mcontext.gregs[REG_ERR] >> 1 & 1;
#elif defined(__aarch64__)
    pc = reinterpret_cast<void*>(registers->uc_mcontext.pc);
#endif
    if (signal == SIGSEGV || signal == SIGBUS) report_access(info->si_addr, pc, write, 0);
    fault("crash", 0, "pc=%lx what=%s", from_start(pc), strsignal(signal));
}

void catch_signals() {
    static char stack[64 << 10];
    stack_t alternative = {};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    const int caught[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    for (int signal : caught)
        sigaction(signal, &action, nullptr);
}

[[noreturn]] void broken(const char* what) {
    fprintf(stderr, "%s: %s\n", what, dlerror());
    exit(2);
}

constexpr unsigned char canary = 0xA5;

Region place(const char* from, unsigned long size) {
    const size_t inside = (size + 4095) / 4096 * 4096;
    char* base = static_cast<char*>(mmap(nullptr, inside + 2 * guard_bytes, PROT_NONE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) broken("mmap");
    char* inner = base + guard_bytes;
    mprotect(inner, inside, PROT_READ | PROT_WRITE);
    memset(inner, canary, inside - size);
    char* memory = inner + inside - size;
    memcpy(memory, from, size);
    sanitizer::forbid(inner, inside - size);
    return {memory, inner, size};
}

void check_canaries() {
    for (unsigned long i = 0; i < header->regions; ++i) {
        sanitizer::allow(regions[i].before, regions[i].memory - regions[i].before);
        for (char* at = regions[i].memory - 1; at >= regions[i].before; --at)
            if (*reinterpret_cast<unsigned char*>(at) != canary)
                fault("out-of-bounds-write", 0, "region=%lu offset=%ld bytes=1", i,
                      long(at - regions[i].memory));
    }
}

}  // namespace

extern "C" {

bool tilefold_arrive(Scope scope, const char* operation, int line, void* parcel) {
    current->parcel = parcel;
    const bool last = scope == Scope::simdgroup ? arrive_simdgroup(operation, line)
                                                : arrive_threadgroup(operation, line);
    if (last) sanitizer::ignore();
    return last;
}

void** tilefold_parcels(int* count) {
    *count = parcel_count;
    return parcels;
}

void tilefold_depart() { sanitizer::heed(); }

void tilefold_barrier(Scope scope, const char* operation, int line, bool orders) {
    // By value: `current` is another one's when the others have run.
    char* order = marks + (scope == Scope::simdgroup ? 1 + current->position.simdgroup : 0);
    if (orders) sanitizer::release(order);
    const bool last = scope == Scope::simdgroup ? arrive_simdgroup(operation, line)
                                                : arrive_threadgroup(operation, line);
    if (orders) sanitizer::acquire(order);
    if (last && scope == Scope::simdgroup) ++header->counts[simdgroup_barriers];
    if (scope == Scope::threadgroup && current->position.lane == 0)
        ++header->counts[threadgroup_barriers];
}

void tilefold_count(Count what) { ++header->counts[what]; }

unsigned tilefold_lane() { return current->position.lane; }
unsigned tilefold_thread() { return current->position.index; }
unsigned tilefold_simdgroups() { return current->position.simdgroups; }

int tilefold_layout() {
    static const char* given = getenv("TENSOR_LAYOUT");
    return given ? *given - '0' : 0;
}

void tilefold_shuffle(const char* operation, int line, void* value, int size, unsigned source) {
    if (source >= lanes_of_simdgroup)
        fault("divergence", line, "%s reads from lane %u", operation, source);
    struct Parcel { char* value; unsigned source; } parcel{static_cast<char*>(value), source};
    if (!tilefold_arrive(Scope::simdgroup, operation, line, &parcel)) return;
    constexpr int largest = 32;
    static char brought[lanes_of_simdgroup][largest];
    for (int i = 0; i < parcel_count; ++i)
        memcpy(brought[i], static_cast<Parcel*>(parcels[i])->value, size);
    for (int i = 0; i < parcel_count; ++i) {
        const Parcel& mine = *static_cast<Parcel*>(parcels[i]);
        memcpy(mine.value, brought[mine.source], size);
    }
    ++header->counts[shuffles];
    tilefold_depart();
}

int tilefold_gather(const char* operation, int line, const void* value, int size, void* all) {
    struct Parcel { const void* value; char* all; } parcel{value, static_cast<char*>(all)};
    if (!tilefold_arrive(Scope::simdgroup, operation, line, &parcel)) return lanes_of_simdgroup;
    for (int i = 0; i < parcel_count; ++i)
        for (int n = 0; n < parcel_count; ++n)
            memcpy(static_cast<Parcel*>(parcels[i])->all + n * size,
                   static_cast<Parcel*>(parcels[n])->value, size);
    ++header->counts[reductions];
    tilefold_depart();
    return lanes_of_simdgroup;
}

void tilefold_agree(const char* operation, int line, const void* pointer, unsigned long number) {
    struct Parcel { const void* pointer; unsigned long number; } parcel{pointer, number};
    if (!tilefold_arrive(Scope::simdgroup, operation, line, &parcel)) return;
    for (int i = 0; i < parcel_count; ++i) {
        const Parcel& other = *static_cast<Parcel*>(parcels[i]);
        if (other.pointer != pointer || other.number != number)
            fault("divergence", line, "%s: lanes %d and %u name different places", operation, i,
                  current->position.lane);
    }
    ++header->counts[operation[10] == 'l' ? matrix_loads : matrix_stores];
    tilefold_depart();
}

void tilefold_refuse(const char* operation, int line, const char* why) {
    fault("refused", line, "%s: %s", operation, why);
}

float tilefold_math(int function, float x, float y) {
    const float result = [&] {
        switch (function) {
            case 0: ++header->counts[exponentials]; return expf(x);
            case 1: ++header->counts[exponentials]; return exp2f(x);
            case 2: ++header->counts[exponentials]; return exp10f(x);
            case 3: return logf(x);
            case 4: return log2f(x);
            case 5: return log10f(x);
            case 6: return tanhf(x);
            case 7: return sinf(x);
            case 8: return cosf(x);
            default: return powf(x, y);
        }
    }();
    return sanitizer::as_written_as(x, y, result);
}

}  // extern "C"

namespace {

typedef float Matrix[8][8];
struct Factors { void* d; const void *a, *b, *c; };

template <class T>
void collect(Matrix& m, const void* Factors::* which) {
    for (int lane = 0; lane < lanes_of_simdgroup; ++lane) {
        const int row = (lane / 2) % 4 + 4 * (lane / 16), column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);
        const T* held = static_cast<const T*>(static_cast<Factors*>(parcels[lane])->*which);
        m[row][column] = float(held[0]);
        m[row][column + 1] = float(held[1]);
    }
}

// Products are summed in float in the order of k, from C, and rounded once.
template <class T, class S>
void product(bool accumulates) {
    Matrix a, b, d = {};
    collect<T>(a, &Factors::a);
    collect<T>(b, &Factors::b);
    if (accumulates) collect<S>(d, &Factors::c);
    for (int i = 0; i < 8; ++i)
        for (int k = 0; k < 8; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < lanes_of_simdgroup; ++lane) {
        const int row = (lane / 2) % 4 + 4 * (lane / 16), column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);
        S* held = static_cast<S*>(static_cast<Factors*>(parcels[lane])->d);
        held[0] = S(d[row][column]);
        held[1] = S(d[row][column + 1]);
    }
}

}  // namespace

extern "C" void tilefold_multiply(const char* operation, int line, Type factor, Type sum, void* d,
                                  const void* a, const void* b, const void* c) {
    const void* pc = __builtin_return_address(0);
    const size_t factor_bytes = factor == Type::of_float ? 8 : 4;
    const size_t sum_bytes = sum == Type::of_float ? 8 : 4;
    current->line = line;
    sanitizer::touch(a, factor_bytes, pc, 0);
    sanitizer::touch(b, factor_bytes, pc, 0);
    if (c) sanitizer::touch(c, sum_bytes, pc, 0);
    sanitizer::touch(d, sum_bytes, pc, 1);
    Factors factors{d, a, b, c};
    if (!tilefold_arrive(Scope::simdgroup, operation, line, &factors)) return;
    ++header->counts[multiplies];
    if (factor == Type::of_float) product<float, float>(c);
    else if (factor == Type::of_half)
        sum == Type::of_half ? product<half, half>(c) : product<half, float>(c);
    else sum == Type::of_bfloat ? product<bfloat, bfloat>(c) : product<bfloat, float>(c);
    tilefold_depart();
}

#if defined(TILEFOLD_COUNT)
// Called for every load and store of the kernel, once per thread. Those of a thread's own variables
// are not counted: on a GPU they are registers.
namespace {
void count_access(const void* address, Count in_device, Count in_threadgroup) {
    const char* at = static_cast<const char*>(address);
    if (!current || (at >= current->stack && at < current->stack + stack_bytes)) return;
    if (at >= section && at < section + header->section_bytes) ++header->counts[in_threadgroup];
    for (unsigned long i = 0; i < header->regions; ++i)
        if (at >= regions[i].memory && at < regions[i].memory + regions[i].size)
            ++header->counts[in_device];
}
}  // namespace
#define TILEFOLD_ACCESS(bytes)                                       \
    extern "C" void __sanitizer_cov_load##bytes(void* at) {          \
        count_access(at, device_loads, threadgroup_loads);           \
    }                                                                \
    extern "C" void __sanitizer_cov_store##bytes(void* at) {         \
        count_access(at, device_stores, threadgroup_stores);         \
    }
TILEFOLD_ACCESS(1)
TILEFOLD_ACCESS(2)
TILEFOLD_ACCESS(4)
TILEFOLD_ACCESS(8)
TILEFOLD_ACCESS(16)
#endif

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) broken("dlopen");
    const int file = open(arguments[2], O_RDWR);
    struct stat status;
    if (file < 0 || fstat(file, &status)) broken(arguments[2]);
    char* content = static_cast<char*>(
        mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    if (content == MAP_FAILED) broken("mmap");
    header = reinterpret_cast<Header*>(content);
    char symbol[512];
    snprintf(symbol, sizeof symbol, "tilefold_enter_%s", arguments[3]);
    entry = reinterpret_cast<Entry>(dlsym(library, symbol));
    Dl_info info;
    if (!entry || !dladdr(reinterpret_cast<void*>(entry), &info)) broken(symbol);
    library_base = info.dli_fbase;
    section = static_cast<char*>(library_base) + header->section_offset;

    catch_signals();
    // For each region: bytes, and where they stand in the file. For each argument: region, offset.
    const unsigned long* words = reinterpret_cast<unsigned long*>(header + 1);
    regions = static_cast<Region*>(calloc(header->regions + 1, sizeof(Region)));
    for (unsigned long i = 0; i < header->regions; ++i, words += 2)
        regions[i] = place(content + words[1], words[0]);
    buffers = static_cast<void**>(calloc(header->arguments + 1, sizeof(void*)));
    for (unsigned long i = 0; i < header->arguments; ++i, words += 2)
        buffers[i] = regions[words[0]].memory + words[1];

    main_identity = sanitizer::begin(section, header->section_bytes);
    for (unsigned z = 0; z * header->group[2] < header->grid[2]; ++z)
        for (unsigned y = 0; y * header->group[1] < header->grid[1]; ++y)
            for (unsigned x = 0; x * header->group[0] < header->grid[0]; ++x) run_group(x, y, z);
    sanitizer::ignore();  // what follows is the host's, when all groups have ended
    check_canaries();

    words = reinterpret_cast<unsigned long*>(header + 1);
    for (unsigned long i = 0; i < header->regions; ++i, words += 2) {
        if (const long at = sanitizer::unwritten(regions[i].memory, regions[i].size); at >= 0)
            fault("unwritten", 0, "region=%lu offset=%ld bytes=1", i, at);
        memcpy(content + words[1], regions[i].memory, regions[i].size);
    }
    sanitizer::heed();
    _exit(0);
}
