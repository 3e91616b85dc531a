/* Sixteen floats at a time, on every target: one register of 16, two of 8, or four of 4.
 *
 * Everything is written with the vector types of GCC and clang, in which + and * are those of C, element by element. Only
 * where a target has an instruction that C cannot say are intrinsics used: fused multiply-add, widening loads, sums over
 * a register. Contraction is off (-ffp-contract=off), so a product and a sum are fused only where `fma16` says so. */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define TARGET_AVX512 1
#define WIDTH 16 /* floats of a register */
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TARGET_AVX2 1
#define WIDTH 8
#else
#define WIDTH 4
#endif

#if defined(TARGET_AVX512) || defined(TARGET_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NUM (16 / WIDTH) /* registers for sixteen floats */
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")
#endif
#define inlined static inline __attribute__((always_inline))
#define EACH UNROLLED for (int part = 0; part < NUM; part++)

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));

typedef struct { floats of[NUM]; } f16x; /* sixteen floats; not half precision */
typedef struct { words of[NUM]; } u16x;  /* sixteen words of 32 bits */

inlined f16x load16(const float *from) {
  f16x x;
  memcpy(&x, from, sizeof x);
  return x;
}

inlined void store16(float *to, f16x x) { memcpy(to, &x, sizeof x); }

/* The first `count` floats, and zeros. */
inlined f16x load_some(const float *from, int64_t count) {
  float all[16] = {0};
  if (count >= 16) return load16(from);
  for (int64_t i = 0; i < count; i++) all[i] = from[i];
  return load16(all);
}

inlined void store_some(float *to, f16x x, int64_t count) {
  float all[16];
  if (count >= 16) {
    store16(to, x);
    return;
  }
  store16(all, x);
  for (int64_t i = 0; i < count; i++) to[i] = all[i];
}

inlined f16x all16(float value) {
  f16x x;
  EACH x.of[part] = value - (floats){0}; /* -0.0 stays what it is */
  return x;
}

inlined f16x add16(f16x a, f16x b) {
  EACH a.of[part] = a.of[part] + b.of[part];
  return a;
}

inlined f16x sub16(f16x a, f16x b) {
  EACH a.of[part] = a.of[part] - b.of[part];
  return a;
}

inlined f16x mul16(f16x a, f16x b) {
  EACH a.of[part] = a.of[part] * b.of[part];
  return a;
}

inlined f16x div16(f16x a, f16x b) {
  EACH a.of[part] = a.of[part] / b.of[part];
  return a;
}

/* a * b + c, rounded once where the target can */
inlined f16x fma16(f16x a, f16x b, f16x c) {
  EACH {
#if defined(TARGET_AVX512)
    c.of[part] = _mm512_fmadd_ps(a.of[part], b.of[part], c.of[part]);
#elif defined(TARGET_AVX2)
    c.of[part] = _mm256_fmadd_ps(a.of[part], b.of[part], c.of[part]);
#elif defined(__aarch64__)
    c.of[part] = (floats)vfmaq_f32((float32x4_t)c.of[part], (float32x4_t)a.of[part], (float32x4_t)b.of[part]);
#else
    c.of[part] = a.of[part] * b.of[part] + c.of[part];
#endif
  }
  return c;
}

/* Where `mask` is all ones a, elsewhere b; masks come from comparisons. */
inlined floats choose(ints mask, floats a, floats b) { return (floats)(((ints)a & mask) | ((ints)b & ~mask)); }

/* The greater ones; b where one of them is no number. */
inlined f16x max16(f16x a, f16x b) {
  EACH a.of[part] = choose((ints)(a.of[part] > b.of[part]), a.of[part], b.of[part]);
  return a;
}

/* Lane j takes lane j + 8, then j + 4, j + 2, j + 1: the one order in which lanes are added, on every target. */
inlined float sum16(f16x x) {
#if defined(TARGET_AVX512) || defined(TARGET_AVX2)
#if defined(TARGET_AVX512)
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.of[0]), _mm512_extractf32x8_ps(x.of[0], 1));
#else
  __m256 eight = _mm256_add_ps(x.of[0], x.of[1]);
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  floats four = (x.of[0] + x.of[2]) + (x.of[1] + x.of[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

/* The sums of some sixteens, each in the order of `sum16`. AVX-512 adds sixteen at once: each step puts the halves that
 * `sum16` adds side by side for two of them. */
inlined void store_sums(float *to, const f16x *x, const int count) {
#if defined(TARGET_AVX512)
  if (count == 16) {
    __m512 eight[8], four[4], two[2];
    /* 0 and 4, 8 and 12 … share a register first, so that the last step leaves them in order */
    UNROLLED for (int i = 0; i < 8; i++) {
      const __m512 a = x[i / 2 + i % 2 * 8].of[0], b = x[i / 2 + i % 2 * 8 + 4].of[0];
      eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    UNROLLED for (int i = 0; i < 4; i++) {
      const __m512 a = eight[2 * i], b = eight[2 * i + 1];
      four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    UNROLLED for (int i = 0; i < 2; i++) {
      const __m512d a = _mm512_castps_pd(four[2 * i]), b = _mm512_castps_pd(four[2 * i + 1]);
      two[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd)));
    return;
  }
#endif
  UNROLLED for (int i = 0; i < count; i++) to[i] = sum16(x[i]);
}

inlined float greatest16(f16x x) {
  float all[16];
  store16(all, x);
  UNROLLED for (int half = 8; half; half /= 2) {
    UNROLLED for (int i = 0; i < half; i++) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
  }
  return all[0];
}

/* Products of bytes. A word holds four of them, of one output; all sums are exact, so that their order is no matter. */

typedef int16_t shorts __attribute__((vector_size(4 * WIDTH)));
typedef struct { ints of[NUM]; } i16x; /* sixteen whole numbers */

/* Add products of each word's four bytes with four others, which are from -127 to 127, to its two sums of 16 bits. Bytes
 * that are not signed are below 128. The caller sees to it that no sum leaves its 16 bits: two products of bytes do not. */
inlined u16x add_products(u16x sums, u16x bytes, const int8_t *four, const int is_signed) {
  uint32_t word;
  memcpy(&word, four, sizeof word);
  EACH {
#if defined(TARGET_AVX512)
    __m512i a = (__m512i)bytes.of[part], b = _mm512_set1_epi32((int)word);
    if (is_signed) {
      b = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
      a = _mm512_abs_epi8(a);
    }
    sums.of[part] = (words)_mm512_add_epi16((__m512i)sums.of[part], _mm512_maddubs_epi16(a, b));
#elif defined(TARGET_AVX2)
    __m256i a = (__m256i)bytes.of[part], b = _mm256_set1_epi32((int)word);
    if (is_signed) {
      b = _mm256_sign_epi8(b, a);
      a = _mm256_abs_epi8(a); /* 128 of -128, which is right where the instruction below reads it */
    }
    sums.of[part] = (words)_mm256_add_epi16((__m256i)sums.of[part], _mm256_maddubs_epi16(a, b));
#else
    const words a = bytes.of[part], b = word - (words){0};
    const shorts odd = ((shorts)a >> 8) * ((shorts)b >> 8);
    const shorts even = ((shorts)(a << 8 & 0xff00ff00) >> 8) * ((shorts)(b << 8 & 0xff00ff00) >> 8);
    sums.of[part] = (words)((shorts)sums.of[part] + (odd + even));
    (void)is_signed; /* below 128 it is the same */
#endif
  }
  return sums;
}

/* Add both sums of 16 bits of each word to one of 32. */
inlined i16x add_pairs(i16x sums, u16x pairs) {
  EACH {
#if defined(TARGET_AVX512)
    __m512i both = _mm512_madd_epi16((__m512i)pairs.of[part], _mm512_set1_epi16(1));
    sums.of[part] = (ints)_mm512_add_epi32((__m512i)sums.of[part], both);
#elif defined(TARGET_AVX2)
    __m256i both = _mm256_madd_epi16((__m256i)pairs.of[part], _mm256_set1_epi16(1));
    sums.of[part] = (ints)_mm256_add_epi32((__m256i)sums.of[part], both);
#else
    sums.of[part] += ((ints)pairs.of[part] >> 16) + ((ints)(pairs.of[part] << 16) >> 16);
#endif
  }
  return sums;
}

inlined f16x floats_of(i16x x) {
  f16x y;
  EACH y.of[part] = __builtin_convertvector(x.of[part], floats);
  return y;
}

/* Of four inputs, each with a byte of 16 outputs, the four bytes of each output as a word. */
inlined u16x load_fours(const uint8_t *from) {
  u16x x;
#if defined(TARGET_AVX512) || defined(TARGET_AVX2)
  const __m256i order = _mm256_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15,
                                         0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  __m256i first = _mm256_loadu_si256((const void *)from), second = _mm256_loadu_si256((const void *)(from + 32));
  __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
  low = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(low, 0xd8), order);
  high = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(high, 0xd8), order);
#if defined(TARGET_AVX512)
  x.of[0] = (words)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
  x.of[0] = (words)low, x.of[1] = (words)high;
#endif
#else
  uint8_t all[64];
  for (int i = 0; i < 4; i++) {
    for (int output = 0; output < 16; output++) all[4 * output + i] = from[16 * i + output];
  }
  memcpy(&x, all, sizeof x);
#endif
  return x;
}

/* Widening loads: sixteen small numbers as floats, all exact. */

inlined f16x load_half16(const uint8_t *from) { /* IEEE half precision */
  f16x x;
#if defined(TARGET_AVX512)
  x.of[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#elif defined(TARGET_AVX2)
  EACH x.of[part] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(from + 16 * part)));
#elif defined(__aarch64__)
  EACH {
    uint16x4_t half = vld1_u16((const uint16_t *)(const void *)(from + 8 * part));
    x.of[part] = (floats)vcvt_f32_f16(vreinterpret_f16_u16(half));
  }
#else
  float all[16];
  for (int i = 0; i < 16; i++) {
    uint16_t half;
    uint32_t bits;
    memcpy(&half, from + 2 * i, 2);
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) { /* infinite, or no number */
      bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
      memcpy(all + i, &bits, 4);
    } else { /* 2^112 moves the exponent, and makes a normal number of a subnormal one */
      float value;
      bits = rest << 13;
      memcpy(&value, &bits, 4);
      value *= 0x1p112f;
      memcpy(&bits, &value, 4);
      bits |= sign;
      memcpy(all + i, &bits, 4);
    }
  }
  x = load16(all);
#endif
  return x;
}

inlined f16x load_brain16(const uint8_t *from) { /* bfloat16: the upper half of a float */
  f16x x;
#if defined(TARGET_AVX512)
  x.of[0] = (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#elif defined(TARGET_AVX2)
  EACH {
    __m128i some = _mm_loadu_si128((const void *)(from + 16 * part));
    x.of[part] = (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16);
  }
#else
  u16x wide;
  EACH for (int i = 0; i < WIDTH; i++) {
    uint16_t some;
    memcpy(&some, from + 2 * (WIDTH * part + i), 2);
    wide.of[part][i] = (uint32_t)some << 16;
  }
  memcpy(&x, &wide, sizeof x);
#endif
  return x;
}

inlined f16x load_int8(const uint8_t *from) {
  f16x x;
#if defined(TARGET_AVX512)
  x.of[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#elif defined(TARGET_AVX2)
  EACH x.of[part] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(from + 8 * part))));
#elif defined(__aarch64__)
  int8x16_t some = vld1q_s8((const int8_t *)from);
  int16x8_t low = vmovl_s8(vget_low_s8(some)), high = vmovl_s8(vget_high_s8(some));
  x.of[0] = (floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
  x.of[1] = (floats)vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
  x.of[2] = (floats)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
  x.of[3] = (floats)vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
#else
  EACH for (int i = 0; i < WIDTH; i++) x.of[part][i] = (float)(int8_t)from[WIDTH * part + i];
#endif
  return x;
}

inlined f16x load_uint8(const uint8_t *from) {
  f16x x;
#if defined(TARGET_AVX512)
  x.of[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)));
#elif defined(TARGET_AVX2)
  EACH x.of[part] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(from + 8 * part))));
#else
  EACH for (int i = 0; i < WIDTH; i++) x.of[part][i] = (float)from[WIDTH * part + i];
#endif
  return x;
}

inlined u16x load_words(const uint8_t *from) {
  u16x x;
  memcpy(&x, from, sizeof x);
  return x;
}

inlined u16x shift_right(u16x x, int bits) {
  EACH x.of[part] = x.of[part] >> (uint32_t)bits;
  return x;
}

/* The lowest bits of each word, at most 4, as a number times `unit`. AVX-512 looks it up in a register of sixteen numbers
 * by the lowest 4 bits, which saves masking and converting; with fewer bits the table repeats. */
inlined f16x low_bits(u16x from, const int bits, const float unit) {
  f16x x;
#if defined(TARGET_AVX512)
#define AT(i) (float)((i) & ((1 << bits) - 1)) * unit
  const __m512 table = _mm512_setr_ps(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), AT(7), AT(8), AT(9), AT(10),
                                      AT(11), AT(12), AT(13), AT(14), AT(15));
#undef AT
  x.of[0] = _mm512_permutexvar_ps((__m512i)from.of[0], table);
#else
  EACH x.of[part] = __builtin_convertvector((ints)(from.of[part] & (uint32_t)((1 << bits) - 1)), floats) * unit;
#endif
  return x;
}
