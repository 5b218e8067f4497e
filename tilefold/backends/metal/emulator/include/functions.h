// Functions of numbers. Those of half are computed in float and rounded; `fast::` and `precise::`
// give what the plain ones do, which is more than a GPU's own promise (section 8 of Apple's
// specification): errors of approximations are not emulated.
#pragma once
#include "lanes.h"
#include "vectors.h"

namespace emulator {
enum Function : int {
    f_exp, f_exp2, f_exp10, f_log, f_log2, f_log10, f_tanh, f_sin, f_cos, f_pow, f_erf
};
}

namespace metal {

// The runtime calls the C library: there it counts exponentials, and says of an unwritten number
// that its exponential is unwritten too.
#define TILEFOLD_FUNCTION(name)                                                                 \
    inline float name(float x) { return tilefold_math(emulator::f_##name, x, 0.0f); }           \
    inline half name(half x) { return half(tilefold_math(emulator::f_##name, float(x), 0.0f)); }
#define TILEFOLD_BUILTIN(name, builtin)                        \
    inline float name(float x) { return builtin(x); }          \
    inline half name(half x) { return half(builtin(float(x))); }
#define TILEFOLD_FUNCTIONS                                                                       \
    TILEFOLD_FUNCTION(exp)                                                                       \
    TILEFOLD_FUNCTION(exp2)                                                                      \
    TILEFOLD_FUNCTION(exp10)                                                                     \
    TILEFOLD_FUNCTION(log)                                                                       \
    TILEFOLD_FUNCTION(log2)                                                                      \
    TILEFOLD_FUNCTION(log10)                                                                     \
    TILEFOLD_FUNCTION(tanh)                                                                      \
    TILEFOLD_FUNCTION(sin)                                                                       \
    TILEFOLD_FUNCTION(cos)                                                                       \
    inline float pow(float x, float y) { return tilefold_math(emulator::f_pow, x, y); }          \
    inline float powr(float x, float y) { return tilefold_math(emulator::f_pow, x, y); }         \
    TILEFOLD_BUILTIN(sqrt, __builtin_sqrtf)                                                      \
    TILEFOLD_BUILTIN(rsqrt, 1.0f / __builtin_sqrtf)                                              \
    inline float divide(float x, float y) { return x / y; }

TILEFOLD_FUNCTIONS
namespace fast { TILEFOLD_FUNCTIONS }
namespace precise { TILEFOLD_FUNCTIONS }

TILEFOLD_BUILTIN(floor, __builtin_floorf)
TILEFOLD_BUILTIN(ceil, __builtin_ceilf)
TILEFOLD_BUILTIN(trunc, __builtin_truncf)
TILEFOLD_BUILTIN(round, __builtin_roundf)
TILEFOLD_BUILTIN(rint, __builtin_rintf)
TILEFOLD_BUILTIN(fabs, __builtin_fabsf)
#undef TILEFOLD_FUNCTION
#undef TILEFOLD_FUNCTIONS
#undef TILEFOLD_BUILTIN

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) {
    return half(__builtin_fma(double(a), double(b), double(c)));
}
template <class T> inline T abs(T x) { return x < T(0) ? T(-x) : x == T(0) ? T(0) : x; }

// Of a number and a NaN both give the number.
template <class T> inline T max(T a, T b) { return a != a ? b : b != b ? a : a < b ? b : a; }
template <class T> inline T min(T a, T b) { return a != a ? b : b != b ? a : b < a ? b : a; }
template <class T> inline T max3(T a, T b, T c) { return max(a, max(b, c)); }
template <class T> inline T min3(T a, T b, T c) { return min(a, min(b, c)); }
template <class T> inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> inline T fmax(T a, T b) { return max(a, b); }
template <class T> inline T fmin(T a, T b) { return min(a, b); }
template <class T> inline T select(T a, T b, bool condition) { return condition ? b : a; }
template <class T> inline T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T> inline bool isnan(T x) { return x != x; }
template <class T> inline bool isinf(T x) { return x == T(INFINITY) || x == T(-INFINITY); }
template <class T> inline bool isfinite(T x) { return !isnan(x) && !isinf(x); }
template <class T> inline bool signbit(T x) { return __builtin_signbit(float(x)); }
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint mulhi(uint x, uint y) { return uint(ulong(x) * ulong(y) >> 32); }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }

namespace fast {
using metal::clamp;
using metal::max;
using metal::min;
}  // namespace fast
namespace precise {
using metal::clamp;
using metal::max;
using metal::min;
}  // namespace precise

}  // namespace metal
