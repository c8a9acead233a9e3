// The numeric core of the insertion: what one pixel contributes, and Adam. The processor instantiates it with vectors
// of channels, the GPU with single numbers, so both run the same arithmetic in the same order.
#pragma once

#if defined(__CUDACC__)
#define PYREWRITE_INLINE __host__ __device__ __forceinline__
#else
#define PYREWRITE_INLINE inline
#endif

namespace pyrewrite {

// The numbers of one step's update, as torch.optim.Adam computes them (eps stands outside the root).
struct AdamStep {
  float rise1, keep2, rise2;  // 1 - beta1, beta2, 1 - beta2
  float root_correction2;     // sqrt(1 - beta2^t)
  float eps;
  float rate;  // -lr / (1 - beta1^t)
};

namespace {

// What the pixel's value lacks to its goal, and the activation's slope there; the rest as in pixel_step.
template <class Ops, class V>
PYREWRITE_INLINE V pixel_difference(V y, V demod, V shift, V goal, V up, V down, V& factor) {
  const V z = y * demod + shift;
  factor = Ops::choose(z, up, down);
  return z * factor - goal;
}

// The size of dloss / dz, and the difference whose sign it takes; the rest as in pixel_step.
template <class Ops, class V>
PYREWRITE_INLINE V pixel_size(V y, V demod, V shift, V goal, V weight, V up, V down, V& loss, V& difference) {
  V factor;
  difference = pixel_difference<Ops>(y, demod, shift, goal, up, down, factor);
  loss += weight * Ops::magnitude(difference);
  return weight * factor;
}

// One pixel of one channel. y: the convolution. Adds to the loss and returns dloss / dz with z = y demod + shift.
//
// Ops: choose(z, a, b): a where z > 0, else b. magnitude(x): |x|. signed_as(x, d): x sign(d), with the sign of 0 being
// 0. weight: that of the pixel in the loss. up, down: the slope of the activation for z > 0 and for others, gain
// included.
template <class Ops, class V>
PYREWRITE_INLINE V pixel_step(V y, V demod, V shift, V goal, V weight, V up, V down, V& loss) {
  V difference;
  const V size = pixel_size<Ops>(y, demod, shift, goal, weight, up, down, loss, difference);
  return Ops::signed_as(size, difference);
}

// One step of Adam for one number. mean and square: its running averages of the gradient and of its square.
template <class Ops, class V>
PYREWRITE_INLINE V adam_step(V lambda, V gradient, V& mean, V& square, const AdamStep& a) {
  mean = mean + a.rise1 * (gradient - mean);
  square = square * a.keep2 + (gradient * gradient) * a.rise2;
  const V divisor = Ops::root(square) / a.root_correction2 + a.eps;
  return lambda + (a.rate * mean) / divisor;
}

}  // namespace
}  // namespace pyrewrite
