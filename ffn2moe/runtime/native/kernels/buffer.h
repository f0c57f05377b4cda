// Memory of a thread's work, kept from one call to the next.
#pragma once

#include "kernels.h"

#include <cstdlib>
#include <new>

namespace ffn2moe {

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

} // namespace ffn2moe
