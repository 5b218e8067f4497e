// Stands in for Apple's header of the same name: the matrix product of tensor operations.
//
// Every thread of the simdgroups that run a product meets the others, where they must agree on the
// operands; then each makes the elements of the result that it holds, so that the tools that watch
// memory see whose reads these are. A meeting orders no memory: that takes a barrier, as it does on
// a GPU. Eight products at a time are summed exactly and added in float, in the order of k; those of
// integers in int. How a GPU sums is not known: Apple promises float at least. What lies outside
// of the operands' extents is unwritten in the result. Relaxed precision changes nothing here.
#pragma once
#include "../metal_tensor"

namespace mpp {
namespace tensor_ops {

using metal::is_same_v;

struct matmul2d_descriptor {
    enum class mode { multiply, multiply_accumulate };

    int m, n, k;
    bool transpose_left, transpose_right, relaxed_precision;
    mode matmul_mode;

    constexpr matmul2d_descriptor(int m, int n, int k = static_cast<int>(metal::dynamic_extent),
                                  bool transpose_left = false, bool transpose_right = false,
                                  bool relaxed_precision = false,
                                  mode matmul_mode = mode::multiply)
        : m(m), n(n), k(k), transpose_left(transpose_left), transpose_right(transpose_right),
          relaxed_precision(relaxed_precision), matmul_mode(matmul_mode) {}
};

// Results that there are for a pair of types.
template <class T> constexpr bool is_byte = is_same_v<T, int8_t> || is_same_v<T, uint8_t>;
template <class A, class B, class C>
constexpr bool multiplies() {
    constexpr bool half_ = is_same_v<A, half> || is_same_v<B, half>;
    constexpr bool brain = is_same_v<A, bfloat> || is_same_v<B, bfloat>;
    constexpr bool single = is_same_v<A, float> || is_same_v<B, float>;
    constexpr bool floats = half_ || brain || single;
    if (!floats) return is_byte<A> && is_same_v<A, B> && is_same_v<C, int>;
    constexpr bool left = is_byte<A> || is_same_v<A, half> || is_same_v<A, bfloat> ||
                          is_same_v<A, float>;
    constexpr bool right = is_byte<B> || is_same_v<B, half> || is_same_v<B, bfloat> ||
                           is_same_v<B, float>;
    if (!left || !right) return false;
    if (is_same_v<C, float>) return true;
    if (single) return false;
    return (half_ && is_same_v<C, half>) || (brain && is_same_v<C, bfloat>);
}

template <class T> struct element_of { typedef typename T::element_type type; };

template <matmul2d_descriptor descriptor, class Scope>
class matmul2d {
    static constexpr size_t simdgroups = Scope::static_size;
    static constexpr bool reads_k = descriptor.k == static_cast<int>(metal::dynamic_extent);
    static_assert(descriptor.m > 0 && descriptor.n > 0 && (reads_k || descriptor.k > 0),
                  "sizes of a product are positive");
    static_assert(descriptor.m % 16 == 0 || descriptor.n % 16 == 0,
                  "m or n of a product is a multiple of 16");

public:
    template <class Left, class Right, class T>
    auto get_destination_cooperative_tensor() const {
        check_types<Left, Right, T>();
        return metal::cooperative_tensor<T, descriptor.m, descriptor.n, simdgroups>();
    }

    template <class Left, class Right, class Result>
    void run(Left& left, Right& right, Result& result, int line = __builtin_LINE()) const {
        typedef typename Result::element_type T;
        check_types<Left, Right, T>();
        const Sizes sizes = agree(left, right, line);
        if constexpr (is_cooperative<Result>::value) {
            for (int i = 0; i < result.get_capacity(); ++i) {
                const emulator::Element at = result.place(i);
                if (!at.valid) continue;
                if (at.row < sizes.rows && at.column < sizes.columns)
                    result.element(i) =
                        product<T>(left, right, at, sizes.steps, [&] { return result.element(i); });
                else result.spoil(i);
            }
        } else {
            const int rows = least(sizes.rows, result.get_extent(1));
            const int columns = least(sizes.columns, result.get_extent(0));
            constexpr int threads = 32 * simdgroups;
            for (int e = tilefold_thread() % threads; e < rows * columns; e += threads) {
                const emulator::Element at{e % columns, e / columns, true};
                T& element = result(at.column, at.row);
                element = product<T>(left, right, at, sizes.steps, [&] { return element; });
            }
        }
    }

private:
    struct Sizes { int rows, columns, steps; };

    template <class T> struct is_cooperative { static constexpr bool value = false; };
    template <class T, int m, int n, size_t s>
    struct is_cooperative<metal::cooperative_tensor<T, m, n, s>> {
        static constexpr bool value = true;
    };

    template <class Left, class Right, class T>
    static void check_types() {
        static_assert(multiplies<typename element_of<Left>::type, typename element_of<Right>::type,
                                 T>(),
                      "matmul2d does not multiply these types into that one");
        static_assert(Left::get_rank() == 2 && Right::get_rank() == 2, "operands have two axes");
    }

    static int least(int a, int b) { return a < b ? a : b; }

    // Everyone has come, with the same operands; returns their sizes.
    template <class Left, class Right>
    static Sizes agree(const Left& left, const Right& right, int line) {
        constexpr const char* operation = "matmul2d::run";
        if (simdgroups > 1 && simdgroups != tilefold_simdgroups())
            tilefold_refuse(operation, line,
                            "written for another number of simdgroups than the threadgroup has");
        struct Parcel { const void *left, *right; int extents[4]; };
        Parcel parcel{left.data(), right.data(),
                      {left.get_extent(0), left.get_extent(1), right.get_extent(0),
                       right.get_extent(1)}};
        const auto scope = simdgroups == 1 ? emulator::Scope::simdgroup : emulator::everyone;
        emulator::meet(scope, operation, line, parcel, [&](Parcel* const* all, int count) {
            for (int i = 1; i < count; ++i) {
                bool same = all[i]->left == all[0]->left && all[i]->right == all[0]->right;
                for (int n = 0; n < 4; ++n) same = same && all[i]->extents[n] == all[0]->extents[n];
                if (!same) tilefold_refuse(operation, line, "threads name different operands");
            }
            tilefold_count(emulator::tensor_multiplies);
        });
        const bool tl = descriptor.transpose_left, tr = descriptor.transpose_right;
        const int rows = left.get_extent(tl ? 0 : 1), columns = right.get_extent(tr ? 1 : 0);
        const int steps = left.get_extent(tl ? 1 : 0), others = right.get_extent(tr ? 0 : 1);
        if (steps != others) tilefold_refuse(operation, line, "the operands differ in k");
        if (!reads_k && steps != descriptor.k)
            tilefold_refuse(operation, line, "the operands' k is not the descriptor's");
        return {least(rows, descriptor.m), least(columns, descriptor.n), steps};
    }

    template <class T, class Left, class Right, class Held>
    static T product(const Left& left, const Right& right, emulator::Element at, int steps,
                     Held held) {
        typedef metal::conditional_t<is_same_v<T, int>, int, float> Sum;
        typedef metal::conditional_t<is_same_v<T, int>, int, double> Exact;
        Sum sum = 0;
        if (descriptor.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate)
            sum = Sum(held());
        for (int first = 0; first < steps; first += 8) {
            Exact part = sum;
            for (int k = first; k < least(first + 8, steps); ++k) {
                const auto a = descriptor.transpose_left ? left(at.row, k) : left(k, at.row);
                const auto b = descriptor.transpose_right ? right(k, at.column) : right(at.column, k);
                part += Exact(Sum(a)) * Exact(Sum(b));
            }
            sum = Sum(part);
        }
        return T(sum);
    }
};

}  // namespace tensor_ops
}  // namespace mpp
