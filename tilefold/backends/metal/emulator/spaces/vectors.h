// Vectors as Clang has them, in place of the classes of ../include/vectors.h.
#pragma once
#include "../include/scalars.h"

namespace metal {

template <class T, int n> using vec = T __attribute__((ext_vector_type(n)));
template <class V, class... Elements> V vector_of(Elements... elements);
template <class V> auto dot(V a, V b) -> decltype(a[0] * b[0]);

#define TILEFOLD_VECTORS(T)                                \
    typedef T T##2 __attribute__((ext_vector_type(2)));    \
    typedef T T##3 __attribute__((ext_vector_type(3)));    \
    typedef T T##4 __attribute__((ext_vector_type(4)));
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
#undef TILEFOLD_VECTORS

}  // namespace metal
