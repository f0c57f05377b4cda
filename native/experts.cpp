// The node `Experts` of domain `ffn2moe` for OpenVINO's CPU plugin. ffn2moe/native.py is its definition.
//
// Two orders of work. Many tokens: blocks of tokens, each by one thread, expert after expert, so that a block's vectors
// stay in the cache and the weights are read once a block. Few tokens: the panels of all experts are shared out among
// the threads, so that each weight is read once. A token's sum over its experts is in the order of their numbers and no
// sum depends on which tokens come together, so that both orders give the same bits with any number of threads.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

namespace ffn2moe {
namespace {

constexpr int kTokensAtOnce = 256; // of one expert: their vectors stay in the cache
constexpr int kBlockTokens = 1024; // of a block that a thread works through
constexpr int kFewTokens = 32;     // an expert on average: below, the threads share the panels

// --- activations ----------------------------------------------------------------------------------------------------

using Function = double (*)(double); // act(z), of z <= 0, from |z|: g(|z|) = -act(-|z|)

double gelu(double a) { return a * 0.5 * std::erfc(a / std::sqrt(2.0)); }
double gelu_tanh(double a) {
    return a * 0.5 * (1 - std::tanh(std::sqrt(2 / 3.14159265358979323846) * (a + 0.044715 * a * a * a)));
}
double silu(double a) { return a / (1 + std::exp(a)); }
double quick_gelu(double a) { return a / (1 + std::exp(1.702 * a)); }
double relu(double) { return 0; }

struct Kind {
    const char* name;
    Function g;
    double limit; // where g is below 1e-6
};
const Kind kKinds[] = {{"gelu", gelu, 5.5},
                       {"gelu_tanh", gelu_tanh, 5.5},
                       {"quick_gelu", quick_gelu, 10},
                       {"relu", relu, 1},
                       {"silu", silu, 17}};

// The polynomial through five Chebyshev points of each piece: Newton's divided differences, then powers.
Activation fitted(const Kind& kind) {
    constexpr int points = kDegree + 1;
    Activation act;
    const double width = kind.limit / kPieces;
    act.pieces_per_unit = float(1 / width);
    act.last = std::nextafter(float(kPieces), 0.0f);
    double at[points];
    for (int i = 0; i < points; ++i) at[i] = 0.5 - 0.5 * std::cos(3.14159265358979323846 * (2 * i + 1) / (2 * points));
    for (int piece = 0; piece < kPieces; ++piece) {
        double difference[points];
        for (int i = 0; i < points; ++i) difference[i] = kind.g((piece + at[i]) * width);
        for (int order = 1; order < points; ++order)
            for (int i = points - 1; i >= order; --i)
                difference[i] = (difference[i] - difference[i - 1]) / (at[i] - at[i - order]);
        double power[points] = {};
        for (int i = points - 1; i >= 0; --i) { // power = power * (t - at[i]) + difference[i]
            for (int p = points - 1; p > 0; --p) power[p] = power[p - 1] - at[i] * power[p];
            power[0] = difference[i] - at[i] * power[0];
        }
        for (int p = 0; p < points; ++p) act.coefficient[p][piece] = float(power[p]);
    }
    return act;
}

// By its name, null where there is none of it. Fitted once: the engine copies the node whenever it infers shapes.
const Activation* activation_of(const std::string& name) {
    static const std::vector<Activation> known = [] {
        std::vector<Activation> made;
        for (const Kind& kind : kKinds) made.push_back(fitted(kind));
        return made;
    }();
    for (size_t i = 0; i < known.size(); ++i)
        if (name == kKinds[i].name) return &known[i];
    return nullptr;
}

// --- which path -----------------------------------------------------------------------------------------------------

const Path& path_of_this_processor() {
    const char* wish = std::getenv("FFN2MOE_NATIVE");
    std::string names;
    for (const auto find : {amx, avx512, avx2, plain}) {
        const Path* path = find();
        if (!path) continue;
        if (!wish || !*wish || std::string(wish) == path->name) return *path;
        names += std::string(names.empty() ? "" : ", ") + path->name;
    }
    OPENVINO_THROW("FFN2MOE_NATIVE=", wish, " is not a path of this processor; it has ", names);
}

// --- memory of the work ---------------------------------------------------------------------------------------------

class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(at_); }

    // At least `bytes`, in whole cache lines; what it held is lost.
    template <class T> T* of(size_t count) {
        const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine + kLine;
        if (bytes > bytes_) {
            std::free(at_);
            at_ = nullptr;
            bytes_ = 0;
            if (posix_memalign(&at_, kLine, bytes)) throw std::bad_alloc();
            bytes_ = bytes;
        }
        return static_cast<T*>(at_);
    }

  private:
    void* at_ = nullptr;
    size_t bytes_ = 0;
};

struct Scratch {
    Buffer x_tiles, x_scales, h, h_tiles, h_scales;
};

// Scratch of all layers of all models: as many as threads work at once. Freed with the last layer.
class Pool {
  public:
    static std::shared_ptr<Pool> shared() {
        static std::mutex mutex;
        static std::weak_ptr<Pool> kept;
        const std::lock_guard<std::mutex> lock(mutex);
        auto pool = kept.lock();
        if (!pool) kept = pool = std::make_shared<Pool>();
        return pool;
    }

    std::unique_ptr<Scratch> take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.empty()) return std::make_unique<Scratch>();
        auto scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
    }

    void give(std::unique_ptr<Scratch> scratch) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(scratch));
    }

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Scratch>> free_;
};

// A thread's part of the work: its scratch, and the state of its processor.
class Turn {
  public:
    Turn(const Path& path, Pool& pool) : scratch(pool.take()), path_(path), pool_(pool) { path_.enter(); }
    ~Turn() {
        path_.leave();
        pool_.give(std::move(scratch));
    }
    std::unique_ptr<Scratch> scratch;

  private:
    const Path& path_;
    Pool& pool_;
};

// --- the work -------------------------------------------------------------------------------------------------------

// The pairs of gate other than 0, sorted by expert; those of an expert in the order of tokens.
struct Pairs {
    std::vector<int32_t> start; // [E + 1]
    std::vector<int32_t> token;
    std::vector<float> gate;
};

template <class Index>
Pairs sort_pairs(const Index* chosen_TK, const float* gates_TK, int from, int to, int K, int E) {
    Pairs pairs;
    pairs.start.assign(E + 1, 0);
    for (size_t i = size_t(from) * K; i < size_t(to) * K; ++i) {
        if (gates_TK[i] == 0) continue;
        OPENVINO_ASSERT(chosen_TK[i] >= 0 && chosen_TK[i] < E, "Experts: token ", i / K, " has chosen expert ",
                        chosen_TK[i], ", but there are 0 to ", E - 1);
        ++pairs.start[chosen_TK[i] + 1];
    }
    for (int e = 0; e < E; ++e) pairs.start[e + 1] += pairs.start[e];
    pairs.token.resize(pairs.start[E]);
    pairs.gate.resize(pairs.start[E]);
    std::vector<int32_t> next(pairs.start.begin(), pairs.start.end() - 1);
    for (int t = from; t < to; ++t)
        for (int k = 0; k < K; ++k) {
            const size_t i = size_t(t) * K + k;
            if (gates_TK[i] == 0) continue;
            const int place = next[chosen_TK[i]]++;
            pairs.token[place] = t;
            pairs.gate[place] = gates_TK[i];
        }
    return pairs;
}

struct Work {
    const Layer& layer;
    const Path& path;
    Pool& pool;
    const uint8_t* experts;
    int E;
    const float* x_TD;
    float* y_TD;

    const uint8_t* expert(int e) const { return experts + size_t(e) * layer.expert_bytes(); }

    Operand operand(Buffer& tiles, Buffer& scales, int rows, int depth) const {
        const int count = (rows + kRows - 1) / kRows;
        return {tiles.of<uint8_t>(count * path.tile_bytes(layer, depth)),
                scales.of<float>(size_t(count) * kRows), rows, depth};
    }

    // Many tokens: pairs of a block, expert after expert, on one thread.
    void block(const Pairs& pairs) const {
        const Turn turn(path, pool);
        Scratch& scratch = *turn.scratch;
        const size_t stride = size_t(layer.hidden_panels()) * kRows;
        for (int e = 0; e < E; ++e)
            for (int from = pairs.start[e]; from < pairs.start[e + 1]; from += kTokensAtOnce) {
                const int rows = std::min(kTokensAtOnce, pairs.start[e + 1] - from);
                const int32_t* tokens = pairs.token.data() + from;
                const Operand x = operand(scratch.x_tiles, scratch.x_scales, rows, layer.width_depth());
                path.load(layer, {x_TD, size_t(layer.width), tokens}, layer.width, x);
                float* h = scratch.h.of<float>(rows * stride);
                path.hidden(layer, expert(e), x, 0, layer.hidden_panels(), h, stride);
                const Operand hidden = operand(scratch.h_tiles, scratch.h_scales, rows, layer.expert_depth());
                path.load(layer, {h, stride, nullptr}, layer.expert_width, hidden);
                path.output(layer, expert(e), hidden, 0, layer.output_panels(), y_TD, layer.width, tokens,
                            pairs.gate.data() + from);
            }
    }

    // Few tokens: the panels of all experts, shared out among the threads.
    void together(const Pairs& pairs, int threads) const {
        struct Part {
            int e;
            Buffer x_tiles, x_scales, h, h_tiles, h_scales;
            Operand x, hidden;
        };
        const size_t stride = size_t(layer.hidden_panels()) * kRows;
        std::vector<std::unique_ptr<Part>> parts;
        for (int e = 0; e < E; ++e) {
            const int rows = pairs.start[e + 1] - pairs.start[e];
            if (rows == 0) continue;
            parts.push_back(std::make_unique<Part>());
            Part& part = *parts.back();
            part.e = e;
            part.x = operand(part.x_tiles, part.x_scales, rows, layer.width_depth());
            part.hidden = operand(part.h_tiles, part.h_scales, rows, layer.expert_depth());
            part.h.of<float>(rows * stride);
        }
        const int count = int(parts.size());
        tbb::parallel_for(0, count, [&](int i) {
            const Turn turn(path, pool);
            path.load(layer, {x_TD, size_t(layer.width), pairs.token.data() + pairs.start[parts[i]->e]},
                      layer.width, parts[i]->x);
        });
        // Shares of an even number of panels, as paths take them in twos.
        const int cuts = std::max(1, 2 * threads / std::max(count, 1));
        const auto share = [](int panels, int cut, int cuts) {
            return std::min(panels, round_up(int(int64_t(panels) * cut / cuts), 2));
        };
        tbb::parallel_for(0, count * cuts, [&](int i) {
            const Turn turn(path, pool);
            Part& part = *parts[i / cuts];
            const int panels = layer.hidden_panels();
            path.hidden(layer, expert(part.e), part.x, share(panels, i % cuts, cuts), share(panels, i % cuts + 1, cuts),
                        part.h.of<float>(part.x.rows * stride), stride);
        });
        tbb::parallel_for(0, count, [&](int i) {
            const Turn turn(path, pool);
            Part& part = *parts[i];
            path.load(layer, {part.h.of<float>(part.x.rows * stride), stride, nullptr}, layer.expert_width, part.hidden);
        });
        tbb::parallel_for(0, threads, [&](int i) {
            const Turn turn(path, pool);
            const int panels = layer.output_panels();
            for (const auto& part : parts)
                path.output(layer, expert(part->e), part->hidden, share(panels, i, threads),
                            share(panels, i + 1, threads), y_TD, layer.width,
                            pairs.token.data() + pairs.start[part->e], pairs.gate.data() + pairs.start[part->e]);
        });
    }
};

template <class Index>
void run(const Work& work, const Index* chosen_TK, const float* gates_TK, int T, int K) {
    const size_t D = work.layer.width;
    const int threads = std::max(1, tbb::this_task_arena::max_concurrency());
    if (threads > 1 && int64_t(T) * K < int64_t(kFewTokens) * work.E * threads) {
        std::memset(work.y_TD, 0, T * D * sizeof(float));
        work.together(sort_pairs(chosen_TK, gates_TK, 0, T, K, work.E), threads);
        return;
    }
    const int blocks = round_up(std::max(1, (T + kBlockTokens - 1) / kBlockTokens), threads);
    const auto block = [&](int i) {
        const int from = int(int64_t(T) * i / blocks), to = int(int64_t(T) * (i + 1) / blocks);
        std::memset(work.y_TD + from * D, 0, (to - from) * D * sizeof(float));
        work.block(sort_pairs(chosen_TK, gates_TK, from, to, K, work.E));
    };
    if (threads == 1)
        for (int i = 0; i < blocks; ++i) block(i);
    else
        tbb::parallel_for(0, blocks, block);
}

// --- the node -------------------------------------------------------------------------------------------------------

class Experts : public ov::op::Op {
  public:
    OPENVINO_OP("Experts", "ffn2moe");

    Experts() = default;
    Experts(const ov::OutputVector& inputs, int64_t width, int64_t expert_width, bool gated,
            const std::string& activation, const std::string& weights, const std::string& activations)
        : Op(inputs), width_(width), expert_width_(expert_width), gated_(gated), activation_(activation),
          weights_(weights), activations_(activations) {
        constructor_validate_and_infer_types();
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("width", width_);
        visitor.on_attribute("expert_width", expert_width_);
        visitor.on_attribute("gated", gated_);
        visitor.on_attribute("activation", activation_);
        visitor.on_attribute("weights", weights_);
        visitor.on_attribute("activations", activations_);
        return true;
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Experts>(inputs, width_, expert_width_, gated_, activation_, weights_, activations_);
    }

    void validate_and_infer_types() override {
        NODE_VALIDATION_CHECK(this, get_input_size() == 4, "takes x, chosen, gates and experts; ", get_input_size(),
                              " inputs were given");
        layer_ = make_layer();
        const auto chosen = get_input_element_type(1);
        check_type(0, "x", ov::element::f32);
        NODE_VALIDATION_CHECK(this, chosen.is_dynamic() || chosen == ov::element::i64 || chosen == ov::element::i32,
                              "chosen must be int64 or int32, not ", chosen);
        check_type(2, "gates", ov::element::f32);
        check_type(3, "experts", ov::element::u8);
        check_shape(0, "x", width_, "tokens, width");
        check_shape(1, "chosen", -1, "tokens, experts of a token");
        check_shape(2, "gates", -1, "tokens, experts of a token");
        check_shape(3, "experts", int64_t(layer_.expert_bytes()),
                    "experts, bytes of each for these attributes: pack them by ffn2moe.native.pack_experts");
        const auto x = get_input_partial_shape(0);
        set_output_type(0, ov::element::f32, x.rank().is_static() ? x : ov::PartialShape{-1, width_});
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape x = inputs[0].get_shape(), chosen = inputs[1].get_shape(), experts = inputs[3].get_shape();
        OPENVINO_ASSERT(x.size() == 2 && x[1] == size_t(width_), "Experts: x has shape ", x, ", not [tokens, ", width_,
                        "]");
        OPENVINO_ASSERT(chosen.size() == 2 && chosen[0] == x[0] && inputs[2].get_shape() == chosen,
                        "Experts: chosen ", chosen, " and gates ", inputs[2].get_shape(),
                        " must both be [tokens, experts of a token], with ", x[0], " tokens");
        OPENVINO_ASSERT(experts.size() == 2 && experts[1] == layer_.expert_bytes(), "Experts: the constant experts is ",
                        experts, ", but has ", layer_.expert_bytes(), " bytes an expert for these attributes");
        outputs[0].set_shape(x);
        const int T = int(x[0]), K = int(chosen[1]), E = int(experts[0]);
        if (T == 0) return true;
        const Work work{layer_,
                        *path_,
                        *pool_,
                        inputs[3].data<const uint8_t>(),
                        E,
                        inputs[0].data<const float>(),
                        outputs[0].data<float>()};
        if (inputs[1].get_element_type() == ov::element::i64)
            run(work, inputs[1].data<const int64_t>(), inputs[2].data<const float>(), T, K);
        else
            run(work, inputs[1].data<const int32_t>(), inputs[2].data<const float>(), T, K);
        return true;
    }

  private:
    Layer make_layer() const {
        constexpr int64_t widest = 1 << 16; // sums of whole numbers stay within 32 bits
        NODE_VALIDATION_CHECK(this, width_ > 0 && expert_width_ > 0 && width_ <= widest && expert_width_ <= widest,
                              "width and expert_width must be 1 to ", widest, ", not ", width_, " and ", expert_width_);
        const Activation* activation = activation_of(activation_);
        NODE_VALIDATION_CHECK(this, activation, "activation '", activation_,
                              "' is not one of gelu, gelu_tanh, quick_gelu, relu, silu");
        NODE_VALIDATION_CHECK(this, weights_ == "bf16" || weights_ == "int8" || weights_ == "int4", "weights '",
                              weights_, "' is not one of bf16, int8, int4");
        const Weights weights = weights_ == "bf16" ? Weights::bf16 : weights_ == "int8" ? Weights::int8 : Weights::int4;
        const bool rounded = weights == Weights::bf16;
        NODE_VALIDATION_CHECK(this, rounded ? activations_ == "bf16" : activations_ == "int16" || activations_ == "int8",
                              "activations '", activations_, "' do not go with weights '", weights_, "': ",
                              rounded ? "bf16 do" : "int16 and int8 do");
        const Activations activations = rounded                    ? Activations::bf16
                                        : activations_ == "int16" ? Activations::int16
                                                                  : Activations::int8;
        return {weights, activations, activation, gated_, int(width_), int(expert_width_)};
    }

    void check_type(size_t input, const char* name, ov::element::Type wanted) const {
        const auto type = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == wanted, name, " must be ", wanted, ", not ", type);
    }

    void check_shape(size_t input, const char* name, int64_t last, const char* meaning) const {
        const auto shape = get_input_partial_shape(input);
        const bool fits = shape.rank().compatible(2) &&
                          (shape.rank().is_dynamic() || last < 0 || shape[1].compatible(ov::Dimension(last)));
        NODE_VALIDATION_CHECK(this, fits, name, " has shape ", shape, ", but must be ",
                              ov::PartialShape{-1, last < 0 ? ov::Dimension() : ov::Dimension(last)}, ": ", meaning);
    }

    int64_t width_ = 0, expert_width_ = 0;
    bool gated_ = false;
    std::string activation_, weights_, activations_;
    Layer layer_ = {};
    const Path* path_ = &path_of_this_processor();
    std::shared_ptr<Pool> pool_ = Pool::shared();
};

ov::OutputVector from_onnx(const ov::frontend::NodeContext& node) {
    ov::OutputVector inputs;
    for (size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(int(i)));
    const auto weights = node.get_attribute<std::string>("weights");
    const std::string usual = weights == "int8" ? "int16" : weights; // of int4 none: they were stored in another way
    return std::make_shared<Experts>(inputs, node.get_attribute<int64_t>("width"),
                                     node.get_attribute<int64_t>("expert_width"),
                                     node.get_attribute<int64_t>("gated") != 0,
                                     node.get_attribute<std::string>("activation"),
                                     weights, node.get_attribute<std::string>("activations", usual))
        ->outputs();
}

} // namespace
} // namespace ffn2moe

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<ffn2moe::Experts>>(),
     std::make_shared<ov::frontend::onnx::ConversionExtension>("Experts", "ffn2moe", ffn2moe::from_onnx)}));
