// Decoding on a CPU: products of a few rows with bfloat16 weights, and attention of a few queries to a bfloat16 cache.
//
// Both take as long as memory gives what they read, once. `native.py` compiles this file and says what arrays are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16;              // columns of a block
constexpr int64_t kBytes = 128 * 1024;  // that a thread takes at a time
constexpr float kHidden = -1e29f;       // what is added to the score of a key that is not seen is less

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Pairs __attribute__((vector_size(4 * kLanes), aligned(4)));

// Call work(0), .., work(count - 1) on this thread and on all of the pool that have nothing else to do.
template <typename Work>
void share(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();  // a thread may come when all is done, and this call has returned
  auto help = [progress, count, work] {
    for (int64_t i; (i = progress->next++) < count; progress->done++) work(i);
  };
  for (int64_t others = std::min(pool.num_threads(), count) - 1; others > 0; others--) {
    auto copy = help;
    pool.Schedule(std::move(copy));
  }
  help();
  while (progress->done < count) std::this_thread::yield();
}

float wide(uint16_t bits) {
  uint32_t word = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

// sum + the products of two bfloat16s of a row with two of each column.
Floats add_products(Floats sum, uint32_t x, Pairs w) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
#else
  sum += wide(x) * (Floats)(w << 16);
  return sum + wide(x >> 16) * (Floats)(w & 0xffff0000u);
#endif
}

// Rows x[R, pairs] with C blocks of columns [pairs, kLanes]: y[R, C kLanes], of which `width` columns exist.
template <int R, int C>
void tile(const uint32_t* x, int64_t pairs, const Pairs* w, float* y, int64_t stride, int64_t width) {
  Floats sums[R][C] = {};
  for (int64_t p = 0; p < pairs; p++)
    for (int c = 0; c < C; c++) {
      Pairs column = w[c * pairs + p];
      for (int r = 0; r < R; r++) sums[r][c] = add_products(sums[r][c], x[r * pairs + p], column);
    }
  for (int r = 0; r < R; r++) std::memcpy(y + r * stride, sums[r], sizeof(float) * std::min<int64_t>(width, C * kLanes));
}

// So many rows with so many blocks, R rows and C blocks at a time.
template <int R, int C>
int64_t tiles(const uint32_t* x, int64_t rows, int64_t pairs, const Pairs* w, int64_t blocks, float* y, int64_t stride,
              int64_t width) {
  int64_t row = 0;
  for (; row + R <= rows; row += R) {
    int64_t block = 0;
    auto at = [&](int64_t b) { return y + row * stride + b * kLanes; };
    for (; block + C <= blocks; block += C)
      tile<R, C>(x + row * pairs, pairs, w + block * pairs, at(block), stride, width - block * kLanes);
    for (; block < blocks; block++)
      tile<R, 1>(x + row * pairs, pairs, w + block * pairs, at(block), stride, width - block * kLanes);
  }
  return row;
}

void part(const uint32_t* x, int64_t rows, int64_t pairs, const Pairs* w, int64_t blocks, float* y, int64_t stride,
          int64_t width) {
  int64_t done = tiles<8, 2>(x, rows, pairs, w, blocks, y, stride, width);
  auto rest = [&](auto tiles) {
    done += tiles(x + done * pairs, rows - done, pairs, w, blocks, y + done * stride, stride, width);
  };
  rest(tiles<4, 2>);
  rest(tiles<2, 4>);
  rest(tiles<1, 4>);
}

ffi::Error Product(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::BufferR3<ffi::U32> w,
                   ffi::ResultBufferR2<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], pairs = w.dimensions()[1], blocks = w.dimensions()[0], N = y->dimensions()[1];
  auto xs = static_cast<const uint32_t*>(x.untyped_data());
  auto ws = static_cast<const Pairs*>(w.untyped_data());
  float* ys = y->typed_data();
  int64_t some = std::max<int64_t>(1, kBytes / (pairs * sizeof(Pairs)) / 4) * 4;
  share(pool, (blocks + some - 1) / some, [=](int64_t i) {
    int64_t first = i * some, last = std::min(blocks, first + some);
    for (int64_t block = first; block < last; block += 4)  // which stay in the cache of a core while rows are many
      part(xs, rows, pairs, ws + block * pairs, std::min<int64_t>(4, last - block), ys + block * kLanes, N,
           N - block * kLanes);
  });
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> q, ffi::BufferR4<ffi::U16> k,
                  ffi::BufferR4<ffi::U16> v, ffi::BufferR4<ffi::F32> more, float cap, ffi::ResultBufferR4<ffi::F32> y) {
  int64_t B = q.dimensions()[0], K = q.dimensions()[1], R = q.dimensions()[2], H = q.dimensions()[3];
  int64_t S = k.dimensions()[2], some = std::max<int64_t>(1, kBytes / (S * H * 4));
  const float *queries = q.typed_data(), *added = more.typed_data();
  const uint16_t *keys = k.typed_data(), *values = v.typed_data();
  int64_t step_b = more.dimensions()[0] > 1, step_k = more.dimensions()[1] > 1, step_r = more.dimensions()[2] > 1;
  int64_t more_k = more.dimensions()[1], more_r = more.dimensions()[2];
  float* out = y->typed_data();

  share(pool, (B * K + some - 1) / some, [=](int64_t i) {
    thread_local std::vector<float> shares;
    shares.resize(S);
    for (int64_t bk = i * some; bk < std::min(B * K, (i + 1) * some); bk++)
      for (int64_t r = 0; r < R; r++) {
        const float* add = added + S * (((bk / K) * step_b * more_k + (bk % K) * step_k) * more_r + r * step_r);
        int64_t first = 0, last = S;
        while (first < S && add[first] < kHidden) first++;
        if (first == S) first = 0;  // nothing is seen: all alike, as in a sum of hidden scores
        else while (add[last - 1] < kHidden) last--;

        const float* query = queries + (bk * R + r) * H;
        float most = -INFINITY, total = 0;
        for (int64_t s = first; s < last; s++) {
          const uint16_t* key = keys + (bk * S + s) * H;
          float score = 0;
          for (int64_t h = 0; h < H; h++) score += query[h] * wide(key[h]);
          if (cap > 0) score = cap * std::tanh(score / cap);
          shares[s] = score + add[s];
          most = std::max(most, shares[s]);
        }
        for (int64_t s = first; s < last; s++) total += shares[s] = std::exp(shares[s] - most);
        float* mixed = out + (bk * R + r) * H;
        std::fill(mixed, mixed + H, 0.0f);
        for (int64_t s = first; s < last; s++) {
          const uint16_t* value = values + (bk * S + s) * H;
          float part = shares[s] / total;
          for (int64_t h = 0; h < H; h++) mixed[h] += part * wide(value[h]);
        }
      }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlm_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::BF16>>()
                                  .Arg<ffi::BufferR3<ffi::U32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlm_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::U16>>()
                                  .Arg<ffi::BufferR4<ffi::U16>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Attr<float>("cap")
                                  .Ret<ffi::BufferR4<ffi::F32>>());
