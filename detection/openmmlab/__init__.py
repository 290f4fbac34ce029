"""Code shared by detection and segmentation. Importing this package loads none of OpenMMLab's packages."""
