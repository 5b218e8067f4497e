// The scalar types of Metal, their limits and their literals.
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef _Float16 half;

#if defined(TILEFOLD_SPACES)
typedef __bf16 bfloat;
#else
// The upper half of a float; rounded to the nearest, ties to even. From a float by name only, as
// the stricter of what Metal's compilers do.
struct bfloat {
    ushort bits;
    bfloat() = default;
    explicit inline bfloat(float x) {
        uint word;
        __builtin_memcpy(&word, &x, 4);
        const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
        bits = nan ? ushort((word >> 16) | 0x40u)
                   : ushort((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
    explicit inline bfloat(half x) : bfloat(float(x)) {}
    explicit inline bfloat(int x) : bfloat(float(x)) {}
    explicit inline bfloat(uint x) : bfloat(float(x)) {}
    inline operator float() const {
        const uint word = uint(bits) << 16;
        float x;
        __builtin_memcpy(&x, &word, 4);
        return x;
    }
};
inline bfloat operator-(bfloat a) { return bfloat(-float(a)); }
inline bfloat operator+(bfloat a, bfloat b) { return bfloat(float(a) + float(b)); }
inline bfloat operator-(bfloat a, bfloat b) { return bfloat(float(a) - float(b)); }
inline bfloat operator*(bfloat a, bfloat b) { return bfloat(float(a) * float(b)); }
inline bfloat operator/(bfloat a, bfloat b) { return bfloat(float(a) / float(b)); }
inline bfloat& operator+=(bfloat& a, bfloat b) { return a = a + b; }
inline bfloat& operator-=(bfloat& a, bfloat b) { return a = a - b; }
inline bfloat& operator*=(bfloat& a, bfloat b) { return a = a * b; }
inline bfloat& operator/=(bfloat& a, bfloat b) { return a = a / b; }
#endif

inline half operator""h(long double x) { return half(x); }

#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX half(65504.0f)
#define HALF_MIN half(6.103515625e-05f)
#define HALF_EPSILON half(9.765625e-04f)
#define INT_MAX __INT_MAX__
#define INT_MIN (-__INT_MAX__ - 1)
#define UINT_MAX (2u * __INT_MAX__ + 1u)
#define LONG_MAX __LONG_MAX__
#define MAXFLOAT __FLT_MAX__
#define HUGE_VALF __builtin_huge_valf()
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f

namespace metal {

template <class T> struct numeric_limits;

template <class T, bool is_signed>
struct whole_limits {
    static constexpr T max() { return is_signed ? T(~(1ull << (8 * sizeof(T) - 1))) : T(~0ull); }
    static constexpr T lowest() { return is_signed ? T(1ull << (8 * sizeof(T) - 1)) : T(0); }
    static constexpr T min() { return lowest(); }
};
template <> struct numeric_limits<char> : whole_limits<char, true> {};
template <> struct numeric_limits<int8_t> : whole_limits<int8_t, true> {};
template <> struct numeric_limits<short> : whole_limits<short, true> {};
template <> struct numeric_limits<int> : whole_limits<int, true> {};
template <> struct numeric_limits<long> : whole_limits<long, true> {};
template <> struct numeric_limits<uchar> : whole_limits<uchar, false> {};
template <> struct numeric_limits<ushort> : whole_limits<ushort, false> {};
template <> struct numeric_limits<uint> : whole_limits<uint, false> {};
template <> struct numeric_limits<ulong> : whole_limits<ulong, false> {};
template <> struct numeric_limits<float> {
    static constexpr float max() { return FLT_MAX; }
    static constexpr float lowest() { return -FLT_MAX; }
    static constexpr float min() { return FLT_MIN; }
    static constexpr float epsilon() { return FLT_EPSILON; }
    static constexpr float infinity() { return INFINITY; }
    static constexpr float quiet_NaN() { return NAN; }
};
template <> struct numeric_limits<half> {
    static constexpr half max() { return HALF_MAX; }
    static constexpr half lowest() { return -HALF_MAX; }
    static constexpr half min() { return HALF_MIN; }
    static constexpr half epsilon() { return HALF_EPSILON; }
    static constexpr half infinity() { return half(INFINITY); }
    static constexpr half quiet_NaN() { return half(NAN); }
};
template <> struct numeric_limits<bfloat> {
    static bfloat max() { return bfloat(3.38953139e38f); }
    static bfloat lowest() { return bfloat(-3.38953139e38f); }
    static bfloat min() { return bfloat(FLT_MIN); }
    static bfloat epsilon() { return bfloat(0.0078125f); }
    static bfloat infinity() { return bfloat(INFINITY); }
    static bfloat quiet_NaN() { return bfloat(NAN); }
};

template <class T, class U> struct is_same { static constexpr bool value = false; };
template <class T> struct is_same<T, T> { static constexpr bool value = true; };
template <class T, class U> constexpr bool is_same_v = is_same<T, U>::value;
template <bool condition, class T, class U> struct conditional { typedef T type; };
template <class T, class U> struct conditional<false, T, U> { typedef U type; };
template <bool condition, class T, class U>
using conditional_t = typename conditional<condition, T, U>::type;
template <bool condition, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool condition, class T = void>
using enable_if_t = typename enable_if<condition, T>::type;

template <class To, class From>
inline To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace metal

using metal::as_type;
