# A coordinator on a small machine of its own, and a gateway in the private network. Neither can be logged in to.

data "aws_region" "current" {}
data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}

data "aws_ssm_parameter" "image" {
  name = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-arm64"
}

data "aws_subnet" "public" {
  id = var.public_subnet_id
}

data "aws_subnet" "private" {
  id = var.private_subnet_id
}

locals {
  releases = "https://github.com/culvertnet/culvert/releases/download"
  anywhere = { ipv4 = "0.0.0.0/0" }
}
