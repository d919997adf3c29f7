# Nothing comes in. Out go the control stream and issuers' keys, STUN and direct paths, and what rules grant.
resource "aws_security_group" "gateway" {
  name        = "${var.name}-gateway"
  description = "Culvert gateway"
  vpc_id      = data.aws_subnet.private.vpc_id
}

resource "aws_vpc_security_group_egress_rule" "gateway_https" {
  security_group_id = aws_security_group.gateway.id
  description       = "the coordinator, issuers, the release"
  cidr_ipv4         = local.anywhere.ipv4
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

resource "aws_vpc_security_group_egress_rule" "gateway_udp" {
  security_group_id = aws_security_group.gateway.id
  description       = "STUN, relay, direct paths to runners"
  cidr_ipv4         = local.anywhere.ipv4
  ip_protocol       = "udp"
  from_port         = 1024
  to_port           = 65535
}

resource "aws_vpc_security_group_egress_rule" "gateway_targets" {
  for_each          = { for t in var.targets : "${t.protocol} ${t.cidr} ${t.from}-${t.to}" => t }
  security_group_id = aws_security_group.gateway.id
  description       = "what rules grant"
  cidr_ipv4         = each.value.cidr
  ip_protocol       = each.value.protocol
  from_port         = each.value.from
  to_port           = each.value.to
}

# The machine may read its own secret and do nothing else.
resource "aws_iam_role" "gateway" {
  name               = "${var.name}-gateway"
  assume_role_policy = data.aws_iam_policy_document.machine.json
}

data "aws_iam_policy_document" "machine" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "gateway" {
  statement {
    actions   = ["ssm:GetParameter"]
    resources = ["arn:${data.aws_partition.current.partition}:ssm:${data.aws_region.current.name}:${data.aws_caller_identity.current.account_id}:parameter/${trimprefix(var.enrolment_parameter, "/")}"]
  }
}

resource "aws_iam_role_policy" "gateway" {
  name   = "enrolment"
  role   = aws_iam_role.gateway.id
  policy = data.aws_iam_policy_document.gateway.json
}

resource "aws_iam_instance_profile" "gateway" {
  name = "${var.name}-gateway"
  role = aws_iam_role.gateway.name
}

resource "aws_instance" "gateway" {
  ami                         = data.aws_ssm_parameter.image.value
  instance_type               = var.instance_type
  subnet_id                   = var.private_subnet_id
  vpc_security_group_ids      = [aws_security_group.gateway.id]
  associate_public_ip_address = false
  iam_instance_profile        = aws_iam_instance_profile.gateway.name
  user_data_replace_on_change = true

  user_data = templatefile("${path.module}/gateway.sh.tftpl", {
    archive   = "${local.releases}/v${var.release.version}/culvert-gateway-linux-arm64.tar.gz"
    sha256    = var.release.gateway
    url       = var.url
    network   = var.network
    owner     = var.owner
    parameter = var.enrolment_parameter
    region    = data.aws_region.current.name
  })

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    encrypted   = true
  }

  tags = { Name = "${var.name}-gateway" }

  lifecycle {
    ignore_changes = [ami]
  }
}
