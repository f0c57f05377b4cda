// See attention.h.
#include "attention.h"
#include "kernels.h"

#include <cstring>
#include <vector>

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

namespace ffn2moe {
namespace {

// The path of this processor; null where it has none: OpenVINO's own kernels are then as fast.
const AttentionPath* path() { return std::strcmp(path_of_this_processor().name, "amx") ? nullptr : attention_amx(); }

// For each text the tokens that are kept, [B, L], and their number, [B].
struct Kept {
    std::vector<int32_t> token_BL, count_B;

    Kept(size_t B, size_t L, const char* keep_BL) : token_BL(B * L), count_B(B) {
        for (size_t b = 0; b < B; ++b)
            for (size_t t = 0; t < L; ++t)
                if (!keep_BL || keep_BL[b * L + t]) token_BL[b * L + count_B[b]++] = int32_t(t);
    }
};

} // namespace

SelfAttention::SelfAttention(const ov::OutputVector& inputs, float scale) : Op(inputs), scale_(scale) {
    constructor_validate_and_infer_types();
}

bool SelfAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("scale", scale_);
    return true;
}

std::shared_ptr<ov::Node> SelfAttention::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<SelfAttention>(inputs, scale_);
}

void SelfAttention::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 3 || get_input_size() == 4,
                          "takes queries, keys, values and keep; ", get_input_size(), " inputs were given");
    const auto type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == ov::element::f32 || type == ov::element::bf16,
                          "queries must be float32 or bfloat16, not ", type);
    for (size_t i = 0; i < 3; ++i) {
        NODE_VALIDATION_CHECK(this, get_input_partial_shape(i).rank().compatible(4), "input ", i, " has shape ",
                              get_input_partial_shape(i), ", not [texts, tokens, heads, size]");
        NODE_VALIDATION_CHECK(this, get_input_element_type(i) == type, "queries are ", type, ", but input ", i, " is ",
                              get_input_element_type(i));
    }
    set_output_type(0, type, get_input_partial_shape(0));
}

bool SelfAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const AttentionPath* path = ffn2moe::path();
    OPENVINO_ASSERT(path, "SelfAttention: this processor has no path of it");
    const ov::Shape& shape = inputs[0].get_shape();
    const size_t B = shape[0], L = shape[1], H = shape[2], N = shape[3];
    for (size_t i = 1; i < 3; ++i)
        OPENVINO_ASSERT(inputs[i].get_shape() == shape, "SelfAttention: queries are ", shape, ", but input ", i, " is ",
                        inputs[i].get_shape());
    const bool masked = inputs.size() > 3;
    OPENVINO_ASSERT(!masked || (inputs[3].get_shape() == ov::Shape{B, 1, 1, L}), "SelfAttention: keep is ",
                    inputs[masked ? 3 : 0].get_shape(), ", not [", B, ", 1, 1, ", L, "]");
    OPENVINO_ASSERT(N > 0 && N % kHeadStep == 0, "SelfAttention: the size of a head, ", N, ", is no multiple of ",
                    kHeadStep);
    outputs[0].set_shape(shape);
    if (ov::shape_size(shape) == 0) return true;
    const Kept kept(B, L, masked ? static_cast<const char*>(inputs[3].data()) : nullptr);
    const bool half = inputs[0].get_element_type() == ov::element::bf16;
    const bool half_out = outputs[0].get_element_type() == ov::element::bf16;
    const auto work = [&](size_t from, size_t to) { // on heads of all texts
        thread_local Buffer buffer;
        path->enter();
        for (size_t i = from; i < to; ++i) {
            const size_t b = i / H, first = b * L * H * N + i % H * N;
            const auto given = [&](int input) {
                return static_cast<const char*>(inputs[input].data()) + first * (half ? 2 : 4);
            };
            void* out = static_cast<char*>(outputs[0].data()) + first * (half_out ? 2 : 4);
            path->head({given(0), given(1), given(2), out, half, half_out, H * N, int(L), int(N),
                        kept.token_BL.data() + b * L, kept.count_B[b], scale_},
                       buffer);
        }
        path->leave();
    };
    const size_t threads = std::max(1, tbb::this_task_arena::max_concurrency());
    if (threads == 1)
        work(0, B * H);
    else
        tbb::parallel_for(size_t(0), threads,
                          [&](size_t i) { work(B * H * i / threads, B * H * (i + 1) / threads); });
    return true;
}

} // namespace ffn2moe

// Whether the node runs on this processor: what is no path of it has none.
extern "C" __attribute__((visibility("default"))) int ffn2moe_has_attention() {
    try {
        return ffn2moe::path() != nullptr;
    } catch (const std::exception&) {
        return 0;
    }
}
