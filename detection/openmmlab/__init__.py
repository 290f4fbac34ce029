"""What detection and segmentation share. Importing this loads none of OpenMMLab's packages."""
