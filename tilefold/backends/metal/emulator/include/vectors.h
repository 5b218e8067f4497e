// Vectors of 2, 3 and 4 elements, as far as kernels here use them: elements, arithmetic,
// conversion. Swizzles of several elements are not among that, and do not compile.
#pragma once
#include "scalars.h"

#if defined(TILEFOLD_SPACES)
#include "../spaces/vectors.h"
#else

namespace metal {

template <class T, int n> struct vec;

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
    T x, y;
    vec() = default;
    inline vec(T all) : x(all), y(all) {}
    inline vec(T x, T y) : x(x), y(y) {}
    template <class U> explicit inline vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
    inline T& operator[](size_t n) { return (&x)[n]; }
    inline const T& operator[](size_t n) const { return (&x)[n]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
    T x, y, z, padding;
    vec() = default;
    inline vec(T all) : x(all), y(all), z(all), padding() {}
    inline vec(T x, T y, T z) : x(x), y(y), z(z), padding() {}
    inline vec(vec<T, 2> v, T z) : x(v.x), y(v.y), z(z), padding() {}
    template <class U>
    explicit inline vec(vec<U, 3> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), padding() {}
    inline T& operator[](size_t n) { return (&x)[n]; }
    inline const T& operator[](size_t n) const { return (&x)[n]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
    T x, y, z, w;
    vec() = default;
    inline vec(T all) : x(all), y(all), z(all), w(all) {}
    inline vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    inline vec(vec<T, 2> v, vec<T, 2> u) : x(v.x), y(v.y), z(u.x), w(u.y) {}
    inline vec(vec<T, 3> v, T w) : x(v.x), y(v.y), z(v.z), w(w) {}
    template <class U>
    explicit inline vec(vec<U, 4> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
    inline T& operator[](size_t n) { return (&x)[n]; }
    inline const T& operator[](size_t n) const { return (&x)[n]; }
};

// The second form takes a scalar on the right, the third one on the left; neither takes part in
// deduction, so that an int may stand beside a vector of floats.
template <class T> struct exactly { typedef T type; };
template <class T> using exactly_t = typename exactly<T>::type;

#define TILEFOLD_ARITHMETIC(op)                                                      \
    template <class T, int n>                                                        \
    inline vec<T, n> operator op(vec<T, n> a, vec<T, n> b) {                         \
        for (int i = 0; i < n; ++i) a[i] = a[i] op b[i];                             \
        return a;                                                                    \
    }                                                                                \
    template <class T, int n>                                                        \
    inline vec<T, n> operator op(vec<T, n> a, exactly_t<T> b) {                      \
        for (int i = 0; i < n; ++i) a[i] = a[i] op b;                                \
        return a;                                                                    \
    }                                                                                \
    template <class T, int n>                                                        \
    inline vec<T, n> operator op(exactly_t<T> a, vec<T, n> b) {                      \
        for (int i = 0; i < n; ++i) b[i] = a op b[i];                                \
        return b;                                                                    \
    }                                                                                \
    template <class T, int n>                                                        \
    inline vec<T, n>& operator op##=(vec<T, n>& a, vec<T, n> b) { return a = a op b; } \
    template <class T, int n>                                                        \
    inline vec<T, n>& operator op##=(vec<T, n>& a, exactly_t<T> b) { return a = a op b; }
TILEFOLD_ARITHMETIC(+)
TILEFOLD_ARITHMETIC(-)
TILEFOLD_ARITHMETIC(*)
TILEFOLD_ARITHMETIC(/)
TILEFOLD_ARITHMETIC(%)
TILEFOLD_ARITHMETIC(&)
TILEFOLD_ARITHMETIC(|)
#undef TILEFOLD_ARITHMETIC

template <class T, int n> inline vec<T, n> operator-(vec<T, n> a) { return T(0) - a; }

template <class T, int n>
inline T dot(vec<T, n> a, vec<T, n> b) {
    T sum = a[0] * b[0];
    for (int i = 1; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

#define TILEFOLD_VECTORS(T)   \
    typedef vec<T, 2> T##2;   \
    typedef vec<T, 3> T##3;   \
    typedef vec<T, 4> T##4;
TILEFOLD_VECTORS(float)
TILEFOLD_VECTORS(half)
TILEFOLD_VECTORS(bfloat)
TILEFOLD_VECTORS(char)
TILEFOLD_VECTORS(uchar)
TILEFOLD_VECTORS(short)
TILEFOLD_VECTORS(ushort)
TILEFOLD_VECTORS(int)
TILEFOLD_VECTORS(uint)
TILEFOLD_VECTORS(long)
TILEFOLD_VECTORS(ulong)
TILEFOLD_VECTORS(bool)
#undef TILEFOLD_VECTORS

}  // namespace metal

#endif
