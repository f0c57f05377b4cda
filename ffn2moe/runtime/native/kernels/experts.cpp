// The node `RoutedExperts` of domain `ffn2moe` for OpenVINO's CPU plugin. ffn2moe/runtime/native defines it.
//
// Two orders of work. Many tokens: blocks of tokens, each by one thread, expert after expert, so that a block's vectors
// stay in the cache and the weights are read once a block. Few tokens: the panels of all experts are shared out among
// the threads, so that each weight is read once. A token's sum over its experts is in the order of their numbers and no
// sum depends on which tokens come together, so that both orders give the same bits with any number of threads.
#include "attention.h"
#include "buffer.h"
#include "kernels.h"
#include "rows.h"

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
constexpr int kBlockTokens = 256; // least of a block that a thread works through, from the router to the last norm
constexpr int kBlockShare = 64;   // tokens of a block for each expert on average: its weights are read once a block
constexpr int kFewTokens = 32;    // an expert on average: below, the threads share the panels

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

// --- memory of the work ---------------------------------------------------------------------------------------------

struct Scratch {
    Buffer x_tiles, x_scales, h, h_tiles, h_scales;
    Buffer x, y, chosen, gates;
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

Pairs sort_pairs(const int32_t* chosen_TK, const float* gates_TK, int count, int K, int E) {
    Pairs pairs;
    pairs.start.assign(E + 1, 0);
    for (size_t i = 0; i < size_t(count) * K; ++i) {
        if (gates_TK[i] == 0) continue;
        ++pairs.start[chosen_TK[i] + 1];
    }
    for (int e = 0; e < E; ++e) pairs.start[e + 1] += pairs.start[e];
    pairs.token.resize(pairs.start[E]);
    pairs.gate.resize(pairs.start[E]);
    std::vector<int32_t> next(pairs.start.begin(), pairs.start.end() - 1);
    for (int t = 0; t < count; ++t)
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

    const uint8_t* expert(int e) const { return experts + size_t(e) * layer.expert_bytes(); }

    Operand operand(Buffer& tiles, Buffer& scales, int rows, int depth) const {
        const int count = (rows + kRows - 1) / kRows;
        return {tiles.of<uint8_t>(count * path.tile_bytes(layer, depth)),
                scales.of<float>(size_t(count) * kRows), rows, depth};
    }

    // Many tokens: pairs of a block, expert after expert, on one thread. Outputs are added to y.
    void block(const Pairs& pairs, const float* x_TD, float* y_TD, Scratch& scratch) const {
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
    void together(const Pairs& pairs, const float* x_TD, float* y_TD, int threads) const {
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

// Whether so few tokens come that threads share panels rather than tokens.
bool are_few(int T, int K, int E, int threads) {
    return threads > 1 && int64_t(T) * K < int64_t(kFewTokens) * E * threads;
}

// body(from, to) for blocks of about as many tokens each, as many to each thread.
template <class Body> void in_blocks(int T, int tokens, int threads, const Body& body) {
    const int blocks = round_up(std::max(1, (T + tokens - 1) / tokens), threads);
    const auto one = [&](int i) { body(int(int64_t(T) * i / blocks), int(int64_t(T) * (i + 1) / blocks)); };
    if (threads == 1)
        for (int i = 0; i < blocks; ++i) one(i);
    else
        tbb::parallel_for(0, blocks, one);
}

int threads_here() { return std::max(1, tbb::this_task_arena::max_concurrency()); }

// Norms, residuals and router of a block of tokens before and after its experts, while they are in the cache.
void run(const Work& work, const RowWork& rows, const Frame& frame, Given given, Given residual, Taken out, int T) {
    const size_t D = frame.width, K = frame.num_active;
    const int threads = threads_here();
    struct Routed {
        float *x, *y;
        int32_t* chosen;
        float* gates;
    };
    const auto place = [&](Scratch& scratch, int count) {
        return Routed{scratch.x.of<float>(count * D), scratch.y.of<float>(count * D),
                      scratch.chosen.of<int32_t>(count * K), scratch.gates.of<float>(count * K)};
    };
    const auto pairs = [&](const Routed& routed, int count) {
        return sort_pairs(routed.chosen, routed.gates, count, int(K), work.E);
    };
    if (!are_few(T, int(K), work.E, threads)) {
        const int tokens = std::max(kBlockTokens, kBlockShare * work.E / int(K));
        in_blocks(T, tokens, threads, [&](int from, int to) {
            const Turn turn(work.path, work.pool);
            const int count = to - from;
            const Routed routed = place(*turn.scratch, count);
            rows.before(frame, count, given.from(from * D), residual.from(from * D), routed.x, routed.y, routed.chosen,
                        routed.gates);
            work.block(pairs(routed, count), routed.x, routed.y, *turn.scratch);
            rows.after(frame, count, routed.y, out.from(from * D));
        });
        return;
    }
    const Turn turn(work.path, work.pool);
    const Routed routed = place(*turn.scratch, T);
    in_blocks(T, T, threads, [&](int from, int to) {
        rows.before(frame, to - from, given.from(from * D), residual.from(from * D), routed.x + from * D,
                    routed.y + from * D, routed.chosen + from * K, routed.gates + from * K);
    });
    work.together(pairs(routed, T), routed.x, routed.y, threads);
    in_blocks(T, T, threads,
              [&](int from, int to) { rows.after(frame, to - from, routed.y + from * D, out.from(from * D)); });
}

// --- the node -------------------------------------------------------------------------------------------------------

// What is the same at every call, made once: the engine clones a node whenever it infers shapes.
struct Plan {
    Layer layer = {};
    Frame frame = {}; // but for its numbers
    const Path* path = &path_of_this_processor();
    const RowWork* rows = &row_work(path->name);
    std::shared_ptr<Pool> pool = Pool::shared();
};

struct Attributes {
    int64_t width = 0, expert_width = 0;
    bool gated = false;
    std::string activation, weights, activations;
    int64_t num_experts = 0, num_active = 0;
    std::string gate, norm_in, norm_out, added, output;
    float epsilon_in = 0, epsilon_out = 0;

    void visit(ov::AttributeVisitor& visitor) {
        visitor.on_attribute("width", width);
        visitor.on_attribute("expert_width", expert_width);
        visitor.on_attribute("gated", gated);
        visitor.on_attribute("activation", activation);
        visitor.on_attribute("weights", weights);
        visitor.on_attribute("activations", activations);
        visitor.on_attribute("num_experts", num_experts);
        visitor.on_attribute("num_active", num_active);
        visitor.on_attribute("gate", gate);
        visitor.on_attribute("norm_in", norm_in);
        visitor.on_attribute("norm_out", norm_out);
        visitor.on_attribute("added", added);
        visitor.on_attribute("output", output);
        visitor.on_attribute("epsilon_in", epsilon_in);
        visitor.on_attribute("epsilon_out", epsilon_out);
    }

    static Attributes of(const ov::frontend::NodeContext& node) {
        const auto weights = node.get_attribute<std::string>("weights");
        const std::string usual = weights == "int8" ? "int16" : weights; // of int4 none: they were stored in another way
        return {node.get_attribute<int64_t>("width"), node.get_attribute<int64_t>("expert_width"),
                node.get_attribute<int64_t>("gated") != 0, node.get_attribute<std::string>("activation"), weights,
                node.get_attribute<std::string>("activations", usual),
                node.get_attribute<int64_t>("num_experts"),
                node.get_attribute<int64_t>("num_active"),
                node.get_attribute<std::string>("gate"),
                node.get_attribute<std::string>("norm_in"),
                node.get_attribute<std::string>("norm_out"),
                node.get_attribute<std::string>("added"),
                node.get_attribute<std::string>("output"),
                node.get_attribute<float>("epsilon_in"),
                node.get_attribute<float>("epsilon_out")};
    }

    Layer layer(const ov::Node* node) const {
        constexpr int64_t widest = 1 << 16; // sums of whole numbers stay within 32 bits
        NODE_VALIDATION_CHECK(node, width > 0 && expert_width > 0 && width <= widest && expert_width <= widest,
                              "width and expert_width must be 1 to ", widest, ", not ", width, " and ", expert_width);
        const Activation* known = activation_of(activation);
        NODE_VALIDATION_CHECK(node, known, "activation '", activation,
                              "' is not one of gelu, gelu_tanh, quick_gelu, relu, silu");
        NODE_VALIDATION_CHECK(node, weights == "bf16" || weights == "int8" || weights == "int4", "weights '", weights,
                              "' is not one of bf16, int8, int4");
        const Weights kind = weights == "bf16" ? Weights::bf16 : weights == "int8" ? Weights::int8 : Weights::int4;
        const bool rounded = kind == Weights::bf16;
        NODE_VALIDATION_CHECK(node, rounded ? activations == "bf16" : activations == "int16" || activations == "int8",
                              "activations '", activations, "' do not go with weights '", weights, "': ",
                              rounded ? "bf16 do" : "int16 and int8 do");
        const Activations tokens = rounded                  ? Activations::bf16
                                   : activations == "int16" ? Activations::int16
                                                            : Activations::int8;
        return {kind, tokens, known, gated, int(width), int(expert_width)};
    }

    Frame frame(const ov::Node* node) const {
        NODE_VALIDATION_CHECK(node, num_active > 0 && num_active <= num_experts,
                              "num_active must be 1 to the number of experts, ", num_experts, ", not ", num_active);
        const auto one_of = [&](const char* name, const std::string& value, std::vector<std::string> known) {
            const auto at = std::find(known.begin(), known.end(), value);
            std::string names;
            for (const auto& other : known) names += (names.empty() ? "" : ", ") + other;
            NODE_VALIDATION_CHECK(node, at != known.end(), name, " '", value, "' is not one of ", names);
            return int(at - known.begin());
        };
        const auto norm = [&](const char* name, const std::string& value, float epsilon) {
            return Norm{NormKind(one_of(name, value, {"none", "layer", "rms"})), epsilon, nullptr, nullptr};
        };
        Frame frame = {};
        frame.width = int(width);
        frame.num_experts = int(num_experts);
        frame.num_active = int(num_active);
        frame.gate = Gate(one_of("gate", gate, {"unit", "softmax", "softmax_topk", "sigmoid"}));
        frame.added = Residual(one_of("added", added, {"none", "x", "sum"}));
        one_of("output", output, {"f32", "bf16"});
        frame.norm_in = norm("norm_in", norm_in, epsilon_in);
        frame.norm_out = norm("norm_out", norm_out, epsilon_out);
        NODE_VALIDATION_CHECK(node, frame.added != Residual::sum || frame.norm_in.kind != NormKind::none,
                              "added 'sum' is that of given and residual, which come with norm_in; there is none");
        return frame;
    }
};

// Numbers of the constant `frame`: router, its bias, the bias of the choice, the output's bias, then norms.
int64_t frame_size(const Frame& frame) {
    const int64_t D = frame.width, E = frame.num_experts;
    const auto norm = [&](const Norm& norm) { return norm.kind == NormKind::none ? 0 : 2 * D; };
    return E * D + 2 * E + D + norm(frame.norm_in) + norm(frame.norm_out);
}

Frame with_numbers(Frame frame, const float* at) {
    const int64_t D = frame.width, E = frame.num_experts;
    const auto take = [&at](int64_t count) { return (at += count) - count; };
    frame.router = take(E * D);
    frame.router_bias = take(E);
    frame.choice_bias = take(E);
    frame.b_out = take(D);
    for (Norm* norm : {&frame.norm_in, &frame.norm_out})
        if (norm->kind != NormKind::none) {
            norm->scale = take(D);
            norm->bias = take(D);
        }
    return frame;
}

class RoutedExperts : public ov::op::Op {
  public:
    OPENVINO_OP("RoutedExperts", "ffn2moe");

    RoutedExperts() = default;
    RoutedExperts(const ov::OutputVector& inputs, const Attributes& attributes,
                  std::shared_ptr<const Plan> plan = nullptr)
        : Op(inputs), attributes_(attributes), plan_(std::move(plan)) {
        constructor_validate_and_infer_types();
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        attributes_.visit(visitor);
        return true;
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<RoutedExperts>(inputs, attributes_, plan_);
    }

    void validate_and_infer_types() override {
        if (!plan_) {
            auto plan = std::make_shared<Plan>();
            plan->layer = attributes_.layer(this);
            plan->frame = attributes_.frame(this);
            plan_ = plan;
        }
        const bool normal = plan_->frame.norm_in.kind != NormKind::none;
        NODE_VALIDATION_CHECK(this, get_input_size() == (normal ? 4 : 3), "takes given, experts, frame",
                              normal ? " and residual" : "", "; ", get_input_size(), " inputs were given");
        check_tokens(0, "given");
        check_type(1, "experts", ov::element::u8);
        check_shape(1, "experts", int64_t(plan_->layer.expert_bytes()),
                    "experts, bytes of each for these attributes: pack them by ffn2moe.runtime.native.pack_experts");
        const auto& experts = get_input_partial_shape(1);
        NODE_VALIDATION_CHECK(this, experts.rank().is_dynamic() || experts[0].compatible(attributes_.num_experts),
                              "num_experts is ", attributes_.num_experts, ", but experts has shape ", experts);
        check_type(2, "frame", ov::element::f32);
        const auto& frame = get_input_partial_shape(2);
        NODE_VALIDATION_CHECK(this, frame.compatible(ov::PartialShape{frame_size(plan_->frame)}), "frame has shape ",
                              frame, ", but these attributes ask for [", frame_size(plan_->frame),
                              "]: make it by ffn2moe.runtime.native.frame");
        if (normal) check_tokens(3, "residual");
        const auto& given = get_input_partial_shape(0);
        set_output_type(0, attributes_.output == "bf16" ? ov::element::bf16 : ov::element::f32,
                        given.rank().is_static() ? given : ov::PartialShape{-1, plan_->layer.width});
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const int T = tokens(inputs[0], "given");
        const Work work = this->work(inputs[1]);
        const bool normal = inputs.size() > 3;
        OPENVINO_ASSERT(!normal || inputs[3].get_shape() == inputs[0].get_shape(), "RoutedExperts: residual ",
                        inputs[3].get_shape(), " and given ", inputs[0].get_shape(), " must have the same shape");
        outputs[0].set_shape(inputs[0].get_shape());
        if (T == 0) return true;
        const Given given = tokens_of(inputs[0]);
        run(work, *plan_->rows, with_numbers(plan_->frame, inputs[2].data<const float>()), given,
            normal ? tokens_of(inputs[3]) : given,
            {outputs[0].data(), outputs[0].get_element_type() == ov::element::bf16}, T);
        return true;
    }

  private:
    void check_type(size_t input, const char* name, ov::element::Type wanted) const {
        const auto type = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == wanted, name, " must be ", wanted, ", not ", type);
    }

    void check_shape(size_t input, const char* name, int64_t last, const char* meaning) const {
        const auto& shape = get_input_partial_shape(input);
        NODE_VALIDATION_CHECK(this, shape.compatible(ov::PartialShape{-1, last}), name, " has shape ", shape,
                              ", but must be ", ov::PartialShape{-1, last}, ": ", meaning);
    }

    // The number of tokens of this call.
    int tokens(const ov::Tensor& x, const char* name) const {
        const ov::Shape& shape = x.get_shape();
        OPENVINO_ASSERT(shape.size() == 2 && shape[1] == size_t(plan_->layer.width), "RoutedExperts: ", name,
                        " has shape ", shape, ", not [tokens, ", plan_->layer.width, "]");
        return int(shape[0]);
    }

    Work work(const ov::Tensor& experts) const {
        const ov::Shape& shape = experts.get_shape();
        const ov::Shape wanted = {size_t(attributes_.num_experts), plan_->layer.expert_bytes()};
        OPENVINO_ASSERT(shape == wanted, "RoutedExperts: the constant experts is ", shape, ", not ", wanted,
                        ", as these attributes ask for");
        return {plan_->layer, *plan_->path, *plan_->pool, experts.data<const uint8_t>(), int(shape[0])};
    }

    void check_tokens(size_t input, const char* name) const {
        const auto type = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == ov::element::f32 || type == ov::element::bf16, name,
                              " must be float32 or bfloat16, not ", type);
        check_shape(input, name, attributes_.width, "tokens, width");
    }

    static Given tokens_of(const ov::Tensor& rows) {
        return {rows.data(), rows.get_element_type() == ov::element::bf16};
    }

    Attributes attributes_;
    std::shared_ptr<const Plan> plan_;
};

ov::OutputVector from_onnx(const ov::frontend::NodeContext& node) {
    ov::OutputVector inputs;
    for (size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(int(i)));
    return std::make_shared<RoutedExperts>(inputs, Attributes::of(node))->outputs();
}

} // namespace

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

const RowWork& row_work(const char* path) {
    const std::string name = path;
    return name == "amx" || name == "avx512" ? rows_avx512::work()
           : name == "avx2"                  ? rows_avx2::work()
                                             : rows_plain::work();
}

} // namespace ffn2moe

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<ffn2moe::RoutedExperts>>(),
     std::make_shared<ov::OpExtension<ffn2moe::SelfAttention>>(),
     std::make_shared<ov::frontend::onnx::ConversionExtension>("RoutedExperts", "ffn2moe", ffn2moe::from_onnx)}));
