// The node `SelfAttention` of domain `ffn2moe` for OpenVINO's CPU plugin: attention of an encoder, where every token of a
// text looks at all tokens that its mask keeps. ffn2moe/runtime/engines/_openvino_attention.py puts it in the place of
// `ScaledDotProductAttention` and the transpositions around it, where this processor has a path of it.
//
// Letters: B texts, L tokens, H heads, N size of a head.
#pragma once

#include "buffer.h"

#include <cstddef>
#include <cstdint>

#include <openvino/op/op.hpp>

namespace ffn2moe {

constexpr int kHeadStep = 32; // a head's size is a multiple of it

// What one head of one text has: rows `stride` numbers apart, float32 or bfloat16 (`half`).
struct Head {
    const void *query, *key, *value;
    void* out;
    bool half, half_out;
    size_t stride;
    int length, size;
    const int32_t* kept; // the tokens that are looked at, in order
    int count;
    float scale; // of the products of queries and keys
};

struct AttentionPath {
    void (*head)(const Head&, Buffer&);
    void (*enter)(); // around the work of a thread
    void (*leave)();
};

const AttentionPath* attention_amx(); // null where it was not compiled

// Inputs: queries, keys and values [B, L, H, N], float32 or bfloat16; keep [B, 1, 1, L], boolean (none: all).
// Output: [B, L, H, N]; 0 for the tokens of a text that keeps none.
class SelfAttention : public ov::op::Op {
  public:
    OPENVINO_OP("SelfAttention", "ffn2moe");

    SelfAttention() = default;
    SelfAttention(const ov::OutputVector& inputs, float scale);
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    void validate_and_infer_types() override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

  private:
    float scale_ = 1; // of the products of queries and keys
};

} // namespace ffn2moe
