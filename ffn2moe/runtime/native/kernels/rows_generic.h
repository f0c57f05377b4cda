// rows.h in vectors of 16 floats that the compiler maps on the instructions it is given. FFN2MOE_ROWS names the file's
// namespace.
#include "rows.h"

#include <cmath>
#include <cstring>
#include <memory>

namespace ffn2moe {
namespace FFN2MOE_ROWS {
namespace {

constexpr int kLanes = 16;
constexpr int kExpertsAtOnce = 8; // or 4, where there are no more
constexpr int kChains = 4; // of a sum along a row, so that an addition need not wait for the last one
typedef float Lanes __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t HighBits __attribute__((vector_size(32)));

// A number of bfloat16: the high half of a float32.
struct Bf16 {
    uint16_t bits;
};

// `count` numbers of a row, filled up by zeros. The compiler knows the count but at the end of a row.
inline __attribute__((always_inline)) Lanes load(const float* at, int count) {
    Lanes v = {};
    std::memcpy(&v, at, count * sizeof *at);
    return v;
}

inline __attribute__((always_inline)) Lanes load(const Bf16* at, int count) {
    HighBits high = {};
    std::memcpy(&high, at, count * sizeof *at);
    return (Lanes)(__builtin_convertvector(high, Bits) << 16);
}

inline __attribute__((always_inline)) void store(float* at, Lanes v, int count) {
    std::memcpy(at, &v, count * sizeof *at);
}

// Rounded to the nearest, of two to the even one.
inline __attribute__((always_inline)) void store(Bf16* at, Lanes v, int count) {
    const Bits bits = (Bits)v, quiet_nan = Bits{} + 0x7FC00000;
    const Bits rounded = bits + 0x7FFF + (bits >> 16 & 1);
    const HighBits high = __builtin_convertvector((v != v ? quiet_nan : rounded) >> 16, HighBits);
    std::memcpy(at, &high, count * sizeof *at);
}

inline float sum(Lanes v) {
    Half half[2];
    std::memcpy(half, &v, sizeof half);
    half[0] += half[1];
    Quarter quarter[2];
    std::memcpy(quarter, half, sizeof quarter);
    quarter[0] += quarter[1];
    return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

// body(place, count) for the vectors of a row.
template <class Body> inline __attribute__((always_inline)) void each(int width, const Body& body) {
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
    if (i < width) body(i, width - i);
}

// The sum over a row of body(place, count): of vectors that are zero beyond the row.
template <class Body> inline __attribute__((always_inline)) float sum_of(int width, const Body& body) {
    Lanes sums[kChains] = {};
    int i = 0;
    for (; i + kChains * kLanes <= width; i += kChains * kLanes)
        for (int chain = 0; chain < kChains; ++chain) sums[chain] += body(i + chain * kLanes, kLanes);
    for (int chain = 0; i < width; i += kLanes, ++chain)
        sums[chain] += i + kLanes <= width ? body(i, kLanes) : body(i, width - i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Moments {
    float mean, factor; // the norm is (x - mean) * factor * scale + bias
};

// Of a row whose numbers add up to `total`.
inline Moments moments(const Norm& norm, int width, const float* row, float total) {
    const float mean = norm.kind == NormKind::layer ? total / float(width) : 0;
    const float squares = sum_of(width, [&](int i, int count) __attribute__((always_inline)) {
        Lanes off = load(row + i, count) - mean;
        for (int lane = count; lane < kLanes; ++lane) off[lane] = 0;
        return off * off;
    });
    return {mean, 1 / std::sqrt(squares / float(width) + norm.epsilon)};
}

// Scores of one or two rows, expert after expert in groups.
template <int rows, int together> inline void score(const Frame& frame, const float* x, float* scores) {
    const int D = frame.width, E = frame.num_experts;
    for (int first = 0; first < E; first += together) {
        const float* router[together];
        for (int e = 0; e < together; ++e) // a group that is not full does its last expert again
            router[e] = frame.router + size_t(first + e < E ? first + e : E - 1) * D;
        Lanes sums[rows][together] = {};
        each(D, [&](int i, int count) __attribute__((always_inline)) {
            Lanes part[rows];
            for (int r = 0; r < rows; ++r) part[r] = load(x + size_t(r) * D + i, count);
            for (int e = 0; e < together; ++e) {
                const Lanes weights = load(router[e] + i, count);
                for (int r = 0; r < rows; ++r) sums[r][e] += part[r] * weights;
            }
        });
        for (int r = 0; r < rows; ++r)
            for (int e = 0; e < together && first + e < E; ++e)
                scores[r * E + first + e] = sum(sums[r][e]) + frame.router_bias[first + e];
    }
}

template <int rows> inline void score(const Frame& frame, const float* x, float* scores) {
    frame.num_experts > kExpertsAtOnce / 2 ? score<rows, kExpertsAtOnce>(frame, x, scores)
                                           : score<rows, kExpertsAtOnce / 2>(frame, x, scores);
}

inline float sigmoid(float s) { return 1 / (1 + std::exp(-s)); }

// The K highest, in falling order; of equal ones the first, as TopK has it.
inline void choose(const Frame& frame, const float* ranked, int32_t* chosen) {
    for (int k = 0; k < frame.num_active; ++k) {
        int best = -1;
        for (int e = 0; e < frame.num_experts; ++e) {
            bool taken = false;
            for (int before = 0; before < k; ++before) taken |= chosen[before] == e;
            if (!taken && (best < 0 || ranked[e] > ranked[best])) best = e;
        }
        chosen[k] = best;
    }
}

inline void weigh(const Frame& frame, const float* scores, const int32_t* chosen, float* gates) {
    const int K = frame.num_active;
    if (frame.gate == Gate::unit) {
        for (int k = 0; k < K; ++k) gates[k] = 1;
    } else if (frame.gate == Gate::sigmoid) {
        for (int k = 0; k < K; ++k) gates[k] = sigmoid(scores[chosen[k]]);
    } else {
        const bool all = frame.gate == Gate::softmax;
        const int count = all ? frame.num_experts : K;
        const auto of = [&](int i) { return scores[all ? i : chosen[i]]; };
        float highest = of(0), total = 0;
        for (int i = 1; i < count; ++i) highest = of(i) > highest ? of(i) : highest;
        for (int i = 0; i < count; ++i) total += std::exp(of(i) - highest);
        for (int k = 0; k < K; ++k) gates[k] = std::exp(scores[chosen[k]] - highest) / total;
    }
}

inline void route(const Frame& frame, const float* scores, float* ranked, int32_t* chosen, float* gates) {
    for (int e = 0; e < frame.num_experts; ++e)
        ranked[e] = (frame.gate == Gate::sigmoid ? sigmoid(scores[e]) : scores[e]) + frame.choice_bias[e];
    choose(frame, ranked, chosen);
    weigh(frame, scores, chosen, gates);
}

// A row's x, and its y but for the experts.
template <class A, class R>
inline void enter(const Frame& frame, const A* given, const R* residual, float* x, float* y) {
    const int D = frame.width;
    if (frame.norm_in.kind == NormKind::none) {
        each(D, [&](int i, int count) __attribute__((always_inline)) {
            const Lanes row = load(given + i, count), bias = load(frame.b_out + i, count);
            store(x + i, row, count);
            store(y + i, frame.added == Residual::none ? bias : bias + row, count);
        });
        return;
    }
    const float total = sum_of(D, [&](int i, int count) __attribute__((always_inline)) {
        const Lanes both = load(given + i, count) + load(residual + i, count);
        store(x + i, both, count);
        return both;
    });
    const Moments by = moments(frame.norm_in, D, x, total);
    each(D, [&](int i, int count) __attribute__((always_inline)) {
        const Lanes both = load(x + i, count), bias = load(frame.b_out + i, count);
        const Lanes scale = load(frame.norm_in.scale + i, count), shift = load(frame.norm_in.bias + i, count);
        const Lanes normal = (both - by.mean) * by.factor * scale + shift;
        store(x + i, normal, count);
        store(y + i,
              frame.added == Residual::none ? bias : bias + (frame.added == Residual::sum ? both : normal), count);
    });
}

template <class A, class R>
void before_rows(const Frame& frame, int rows, const A* given, const R* residual, float* x, float* y, int32_t* chosen,
                 float* gates) {
    const size_t D = frame.width, E = frame.num_experts, K = frame.num_active;
    const std::unique_ptr<float[]> scratch(new float[3 * E]);
    float *const scores = scratch.get(), *const ranked = scores + 2 * E;
    for (int row = 0; row < rows; row += 2) {
        const int count = rows - row > 1 ? 2 : 1;
        const size_t at = row * D;
        for (int r = 0; r < count; ++r)
            enter(frame, given + at + r * D, residual + at + r * D, x + at + r * D, y + at + r * D);
        count > 1 ? score<2>(frame, x + at, scores) : score<1>(frame, x + at, scores);
        for (int r = 0; r < count; ++r)
            route(frame, scores + r * E, ranked, chosen + (row + r) * K, gates + (row + r) * K);
    }
}

void before(const Frame& frame, int rows, Given given, Given residual, float* x, float* y, int32_t* chosen,
            float* gates) {
    const auto with = [&](auto* a, auto* r) { before_rows(frame, rows, a, r, x, y, chosen, gates); };
    const auto *a = static_cast<const float*>(given.at), *r = static_cast<const float*>(residual.at);
    const auto *half_a = static_cast<const Bf16*>(given.at), *half_r = static_cast<const Bf16*>(residual.at);
    if (given.half)
        residual.half ? with(half_a, half_r) : with(half_a, r);
    else
        residual.half ? with(a, half_r) : with(a, r);
}

template <class Out> void after_rows(const Frame& frame, int rows, const float* y, Out* out) {
    const int D = frame.width;
    const Norm& norm = frame.norm_out;
    for (int row = 0; row < rows; ++row, y += D, out += D) {
        if (norm.kind == NormKind::none) {
            each(D, [&](int i, int count)
                     __attribute__((always_inline)) { store(out + i, load(y + i, count), count); });
            continue;
        }
        const float total = sum_of(D, [&](int i, int count)
                                          __attribute__((always_inline)) { return load(y + i, count); });
        const Moments by = moments(norm, D, y, total);
        each(D, [&](int i, int count) __attribute__((always_inline)) {
            const Lanes scale = load(norm.scale + i, count), shift = load(norm.bias + i, count);
            store(out + i, (load(y + i, count) - by.mean) * by.factor * scale + shift, count);
        });
    }
}

void after(const Frame& frame, int rows, const float* y, Taken out) {
    out.half ? after_rows(frame, rows, y, static_cast<Bf16*>(out.at))
             : after_rows(frame, rows, y, static_cast<float*>(out.at));
}

} // namespace

const RowWork& work() {
    static const RowWork work = {before, after};
    return work;
}

} // namespace FFN2MOE_ROWS
} // namespace ffn2moe
