// How lanes of the emulated GPU meet: the one interface between headers and the runtime.
//
// Every thread of a threadgroup is a fiber: it runs alone until it has to wait. An operation of a
// simdgroup is written with `meet`:
//
//     struct Parcel { const float* in; float* out; } parcel{&x, &y};      // what this lane brings
//     emulator::meet(emulator::Scope::simdgroup, "simd_rotate", line, parcel,
//                    [](Parcel* const* all, int count) {                   // run by the last one
//         for (int lane = 0; lane < count; ++lane) *all[lane]->out = *all[(lane + 1) % count]->in;
//     });
//
// Each lane waits until all lanes of the scope have called the same operation in the same line
// (`int line = __builtin_LINE()` as the last, defaulted parameter of the emulated function gives the
// line of the emitted text). Then the last to arrive runs the function once, with everyone's
// parcels in the order of lanes, and all go on. Lanes that arrive elsewhere, or have ended, are a
// fault. The scope is a simdgroup (a full one: 32 lanes) or all threads of the threadgroup.
//
// What the function does to parcels, and to what they point to, is no memory access of the kernel:
// nothing in it is reported as a race. So it must not touch the kernel's device or threadgroup
// memory. Each lane does that itself, before or after the meeting, for the elements that it owns.
// A meeting does not order memory: only a barrier does, `synchronise` with what its flags say.
#pragma once

namespace emulator {

enum class Scope : int { simdgroup, threadgroup };
constexpr Scope everyone = Scope::threadgroup;  // that word is a macro once a text has begun

// What is counted, in the order of `Counters` in launch.py. Operations of a simdgroup count once
// per simdgroup, the rest once per thread.
enum Count : int {
    multiplies, shuffles, reductions, simdgroup_barriers, threadgroup_barriers,
    matrix_loads, matrix_stores, exponentials, elements, tensor_multiplies,
    device_loads, device_stores, threadgroup_loads, threadgroup_stores, counts
};

enum class Type : int { of_half, of_float, of_bfloat };

struct Position {
    unsigned group[3], inside[3], place[3], groups[3], size[3], threads[3], full_size[3];
    unsigned lane, simdgroup, index, simdgroups;
};

}  // namespace emulator

extern "C" {
// True to the last of the scope, who then must call `tilefold_depart`.
bool tilefold_arrive(emulator::Scope scope, const char* operation, int line, void* parcel);
void** tilefold_parcels(int* count);
void tilefold_depart();
// Barriers: `orders` says whether memory of the threadgroup or device is made visible.
void tilefold_barrier(emulator::Scope scope, const char* operation, int line, bool orders);
void tilefold_count(emulator::Count what);
unsigned tilefold_lane();
// The number of this thread and of simdgroups in the threadgroup, and how cooperative tensors lie.
unsigned tilefold_thread();
unsigned tilefold_simdgroups();
int tilefold_layout();
// D = A B + C (or A B without `c`) of 8x8 fragments; the pointers are this lane's two elements.
void tilefold_multiply(const char* operation, int line, emulator::Type factor, emulator::Type sum,
                       void* d, const void* a, const void* b, const void* c);
// Each lane gets the `size` bytes of lane `source`.
void tilefold_shuffle(const char* operation, int line, void* value, int size, unsigned source);
// `all` receives the `size` bytes of every lane; returns how many lanes there are.
int tilefold_gather(const char* operation, int line, const void* value, int size, void* all);
// A fault unless all lanes bring the same two numbers.
void tilefold_agree(const char* operation, int line, const void* pointer, unsigned long number);
[[noreturn]] void tilefold_refuse(const char* operation, int line, const char* why);
float tilefold_math(int function, float x, float y);
}

namespace emulator {

template <class Parcel, class Act>
inline void meet(Scope scope, const char* operation, int line, Parcel& parcel, Act act) {
    if (tilefold_arrive(scope, operation, line, &parcel)) {
        int count;
        Parcel* const* all = reinterpret_cast<Parcel* const*>(tilefold_parcels(&count));
        act(all, count);
        tilefold_depart();
    }
}

// What an attribute of a kernel's parameter gives, as the parameter's type.
template <class T>
struct Given {
    static T of(const unsigned* xyz) { return T(xyz[0]); }
};

}  // namespace emulator
