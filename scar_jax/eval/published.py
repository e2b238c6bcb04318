"""The paper's numbers and those of its baselines, to stand beside ours.

In: nothing. Out: rows for tables, in the units of the tables. Called by
`suites/`. Source: SCAR, arXiv 2511.14063, and method 10.5. The depth FID of
SCAR with LlamaGen-L is 2.50 in the main table.
"""

from collections.abc import Mapping

Rows = Mapping[str, Mapping[str, float]]

PIE: Rows = {
  'InstructPix2Pix': dict(
    structure=107.43, psnr=16.69, lpips=271.33, clip_whole=23.49
  ),
  'MGIE': dict(structure=67.41, psnr=21.20, lpips=142.25, clip_whole=24.28),
  'SEED-X-Edit': dict(
    structure=61.69, psnr=18.80, lpips=173.63, clip_whole=25.51
  ),
  'ControlAR, trained to edit': dict(
    structure=116.99, psnr=14.63, lpips=289.34, mse=590.63, clip_whole=24.07
  ),
  'EditAR': dict(
    structure=39.43, psnr=21.32, lpips=117.15, mse=130.27, clip_whole=24.87
  ),
  'SCAR, LlamaGen-XL (paper)': dict(
    structure=30.98, psnr=22.59, lpips=105.09, mse=83.47, clip_whole=26.07
  ),
}

# FID by control map, ImageNet at 256 pixels from class and map.
C2I: Rows = {
  'ControlAR, LlamaGen-L': dict(canny=7.69, depth=4.19),
  'ControlVAR, VAR-d30': dict(canny=7.85, depth=6.50),
  'CAR, VAR-d30': dict(canny=8.30, depth=6.90, hed=5.60, sketch=10.20),
  'SCAR, VAR-d20 (paper)': dict(canny=1.97, depth=3.29, hed=1.51, sketch=3.39),
  'SCAR, LlamaGen-L (paper)': dict(
    canny=2.69, depth=2.50, hed=2.67, sketch=3.04
  ),
}

# FID by control map, MultiGen-20M at 512 pixels from caption and map.
T2I: Rows = {
  'ControlNet': dict(depth=17.76, hed=15.41, canny=14.73),
  'ControlNet++': dict(depth=16.66, hed=15.01, canny=18.23, lineart=13.88),
  'ControlAR': dict(depth=14.61, hed=10.53, canny=17.51, lineart=12.41),
  'EditAR': dict(depth=15.97, canny=13.91),
  'SCAR, LlamaGen-XL (paper)': dict(
    depth=13.77, hed=8.41, canny=10.82, lineart=8.91
  ),
}

# MS-SSIM of HED maps x 100, of the same models.
HED_SSIM: Mapping[str, float] = {
  'ControlNet': 76.21,
  'ControlNet++': 80.97,
  'ControlAR': 85.63,
  'SCAR, LlamaGen-XL (paper)': 83.09,
}
